"""Random calls of adamw_step that know their truth in fp64 and how far fp32 may be from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from feinwerk.codebook import dynamic_map
from feinwerk.ops import adamw_step
from feinwerk.testing import assert_same_bits

MASTERS = ("fp32", "remainder", "stochastic")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
_TENSORS = (
    "params", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes",
    "remainders",
)  # fmt: skip
_SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
_SHAPES = ((5, 300),)
_UNIT = 2.0**-24  # half an ulp of 1 in fp32
_DENORMAL = 2.0**-149
# What products of errors add to their sum: far below a thousandth.
_SECOND_ORDER = 1 + 2.0**-10


@dataclass(eq=False)
class StepCase:
    """The arguments of adamw_step: its lists of tensors, and the other options."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    exp_avg_absmaxes: list[torch.Tensor]
    exp_avg_sq_absmaxes: list[torch.Tensor]
    remainders: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Every list by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def copy(self) -> StepCase:
        """Return the same values in tensors of their own."""
        tensors = {name: [t.clone() for t in found] for name, found in self.tensors.items()}
        return StepCase(**tensors, options=dict(self.options))

    def step(self, **changes: Any) -> None:
        """Call adamw_step, with some options changed."""
        arguments: dict[str, Any] = {**self.tensors, **self.options, **changes}
        adamw_step(**arguments)

    def advance(self, seed: int) -> None:
        """Count every step up and draw new gradients, of another size for each tensor."""
        self.options["steps"] = [step + 1 for step in self.options["steps"]]
        generator = torch.Generator().manual_seed(seed)
        for i, grad in enumerate(self.grads):
            grad.copy_(torch.randn(grad.shape, generator=generator) * 0.1 ** (i % 3))

    def master(self, i: int) -> torch.Tensor:
        """Return the fp32 parameter that the step works on."""
        param = self.params[i]
        if not self.remainders:
            return param.float()
        bits = (param.view(torch.int16).int() << 16) + self.remainders[i].int()
        return bits.view(torch.float32)

    def moments(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return exp_avg and exp_avg_sq in fp32, decoded where they are codes."""
        pair = (self.exp_avgs[i], self.exp_avg_sqs[i])
        if pair[0].dtype is not torch.uint8:
            return pair[0].float(), pair[1].float()
        scales = (self.exp_avg_absmaxes[i], self.exp_avg_sq_absmaxes[i])
        size = self.options.get("blocksize", 256)
        first, second = (
            dynamic_map(signed)[codes.int()] * spread(absmax, codes, size)
            for codes, absmax, signed in zip(pair, scales, (True, False), strict=True)
        )
        return first, second

    def assert_same(self, other: StepCase, what: str = "") -> None:
        """Raise AssertionError unless every tensor has the bits of the other case's."""
        for name, tensors in self.tensors.items():
            theirs = getattr(other, name)
            # Most often all are equal: one comparison instead of many.
            if tensors and torch.equal(_bytes(tensors), _bytes(theirs)):
                continue
            for i, (left, right) in enumerate(zip(tensors, theirs, strict=True)):
                assert_same_bits(left, right, f"{what} {name}[{i}] {tuple(left.shape)}")

    def exact(self, i: int) -> ExactStep:
        """Return what the step makes of parameter i in fp64, with the error fp32 may add."""
        scalars = {name: self.options.get(name, default) for name, default in _SCALARS.items()}
        factor = -1.0 if self.options.get("maximize") else 1.0
        if self.options.get("clip_coef") is not None:
            factor *= float(self.options["clip_coef"])
        if self.options.get("grad_scale") is not None:
            factor /= float(self.options["grad_scale"])
        return exact_step(
            self.master(i), self.grads[i], *self.moments(i), step=self.options["steps"][i],
            factor=factor, **scalars,
        )  # fmt: skip


def _bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors]).view(torch.uint8)


def spread(absmax: torch.Tensor, like: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Return the absmax of every element, with the shape of `like`; blocks do not cross rows.

    Args:
        absmax: fp32, rows * ceil(row length / blocksize) elements.
        like: a tensor of the parameter's shape.
        blocksize: elements per absmax.

    Returns:
        fp32, like `like`.

    Example:
        >>> spread(torch.tensor([1.0, 2.0]), torch.zeros(2, 2), 256)
        tensor([[1., 1.],
                [2., 2.]])
    """
    rows = like.shape[0] if like.dim() > 1 else 1
    length = like.numel() // max(1, rows)
    column = torch.arange(length) // blocksize
    return absmax.view(rows, -(-length // blocksize))[:, column].reshape(like.shape)


@dataclass(frozen=True, eq=False)
class ExactStep:
    """Parameter and moments after a step in fp64, and for each the error that is allowed."""

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    param_error: torch.Tensor
    exp_avg_error: torch.Tensor
    exp_avg_sq_error: torch.Tensor


def exact_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    factor: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> ExactStep:
    """Do one step in fp64 and bound, operation by operation, what fp32 arithmetic makes of it.

    With u = 2^-24 the relative error of one rounding, that of every scalar included, and u' the
    smallest denormal where a product may underflow (docs/numerics.md, "adamw_step"):

        g      3 u |g|                                 factor has two roundings, the product one
        m      u |m'| + (1 - beta1) (3 u |g| + 3 u |g - m|)
        v      10 u v'                                 every term is positive
        d      4 u d + what the error of v makes of sqrt(v') / sqrt(1 - beta2^t)
        m'/d   (error of m) / d + |m' / d| (u + (error of d) / d)
        p      u |p'| + 2 u |p (1 - lr decay)| + size (error of m'/d + 2 u |m' / d|)

    Args:
        param: fp32, before the step.
        grad: any floating dtype.
        exp_avg: fp32, before the step.
        exp_avg_sq: fp32, before the step.
        step: t, this step included.
        factor: what multiplies the gradient.
        lr: learning rate.
        beta1: decay of exp_avg.
        beta2: decay of exp_avg_sq.
        eps: in the denominator.
        weight_decay: decoupled.

    Returns:
        fp64 values and bounds of the parameter's shape.

    Example:
        >>> one = torch.ones(1)
        >>> exact_step(one, one, one * 0, one * 0, step=1, factor=1.0, **_SCALARS).exp_avg
        tensor([0.1000], dtype=torch.float64)
    """
    u = _UNIT
    p, m, v = param.double(), exp_avg.double(), exp_avg_sq.double()
    g = grad.double() * factor
    new_m = m + (g - m) * (1 - beta1)
    new_v = v * beta2 + g * g * (1 - beta2)
    m_error = u * new_m.abs() + (1 - beta1) * 3 * u * (g.abs() + (g - m).abs()) + 4 * _DENORMAL
    v_error = 10 * u * new_v + 4 * _DENORMAL

    correction = 1 / math.sqrt(1 - beta2**step)
    size = lr / (1 - beta1**step)
    below = (new_v - v_error * _SECOND_ORDER).clamp(min=0)
    root_error = torch.maximum(
        (new_v + v_error * _SECOND_ORDER).sqrt() - new_v.sqrt(), new_v.sqrt() - below.sqrt()
    )
    denominator = new_v.sqrt() * correction + eps
    denominator_error = 4 * u * denominator + root_error * correction
    ratio = new_m / denominator
    ratio_error = m_error / denominator + ratio.abs() * (denominator_error / denominator + u)
    kept = p * (1 - lr * weight_decay)
    new_p = kept - ratio * size
    p_error = u * new_p.abs() + 2 * u * kept.abs() + size * (ratio_error + 2 * u * ratio.abs())
    p_error = p_error + 4 * _DENORMAL
    errors = [error * _SECOND_ORDER for error in (p_error, m_error, v_error)]
    return ExactStep(new_p, new_m, new_v, *errors)


def make_step(
    shapes: Sequence[tuple[int, ...]] = _SHAPES,
    *,
    master: str = "fp32",
    grads: torch.dtype = torch.float32,
    states: torch.dtype = torch.float32,
    blocksize: int = 256,
    seed: int = 0,
) -> StepCase:
    """Return a list of random parameters with new states, before their first steps.

    Args:
        shapes: of the parameters.
        master: "fp32", or "remainder" or "stochastic" for bf16 parameters.
        grads: dtype of the gradients.
        states: dtype of the states; uint8 for codes.
        blocksize: elements per absmax.
        seed: of the generator, and of the stochastic rounding.

    Returns:
        The case; the tensors count their steps from different numbers.

    Example:
        >>> case = make_step(((2, 3),), states=torch.uint8)
        >>> case.step()
        >>> case.exp_avg_absmaxes[0].shape
        torch.Size([2, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, list[torch.Tensor]] = {name: [] for name in _TENSORS}
    for i, shape in enumerate(shapes):
        dtype = torch.float32 if master == "fp32" else torch.bfloat16
        tensors["params"].append(torch.randn(shape, generator=generator).to(dtype))
        grad = torch.randn(shape, generator=generator) * 0.1 ** (i % 3)
        tensors["grads"].append(grad.to(grads))
        for name, zero in (("exp_avgs", 127), ("exp_avg_sqs", 0)):
            fill = zero if states is torch.uint8 else 0
            tensors[name].append(torch.full(shape, fill, dtype=states))
        if states is torch.uint8:
            rows = shape[0] if len(shape) > 1 else 1
            blocks = -(-math.prod(shape[1:] if len(shape) > 1 else shape) // blocksize)
            for name in ("exp_avg_absmaxes", "exp_avg_sq_absmaxes"):
                tensors[name].append(torch.zeros(rows, blocks))
        if master == "remainder":
            low = torch.randint(-(2**15), 2**15, shape, generator=generator)
            tensors["remainders"].append(low.to(torch.int16))
    options: dict[str, Any] = {**_SCALARS, "blocksize": blocksize}
    options["steps"] = [1 + 3 * i for i in range(len(shapes))]
    if master == "stochastic":
        options["seed"] = torch.tensor(seed * 2**33 + 12345)
        options["parameter_ids"] = [5 * i + 2 for i in range(len(shapes))]
    return StepCase(**tensors, options=options)
