"""adamw_step: check, schema and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.adamw_step import cpp, reference

Tensors = Sequence[torch.Tensor]
_OP_NAME = "adamw_step"
_STATES = (torch.float32, torch.bfloat16, torch.uint8)
_LARGEST = 2**31 - 1


def _check(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    remainders: Tensors,
    steps: Sequence[int],
    parameter_ids: Sequence[int],
    first_elements: Sequence[int],
    seed: torch.Tensor | None = None,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int = 256,
    maximize: bool = False,
) -> None:
    op, count = _OP_NAME, len(params)
    _scalars(lr, beta1, beta2, eps, weight_decay)
    _checks.positive(op, "blocksize", blocksize)
    quantized = count > 0 and len(exp_avgs) > 0 and exp_avgs[0].dtype is torch.uint8
    lists: dict[str, tuple[Sequence[Any], bool]] = {
        "grads": (grads, True),
        "exp_avgs": (exp_avgs, True),
        "exp_avg_sqs": (exp_avg_sqs, True),
        "exp_avg_absmaxes": (exp_avg_absmaxes, quantized),
        "exp_avg_sq_absmaxes": (exp_avg_sq_absmaxes, quantized),
        "remainders": (remainders, len(remainders) > 0),
        "steps": (steps, True),
        "parameter_ids": (parameter_ids, True),
        "first_elements": (first_elements, True),
    }
    for name, (values, needed) in lists.items():
        if len(values) != (count if needed else 0):
            _checks.reject(
                ValueError, op, name, f"have {count if needed else 0} entries", len(values)
            )
    scalars = {"clip_coef": clip_coef, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, value in scalars.items():
        if value is not None and (value.numel() != 1 or not value.is_floating_point()):
            got = f"{value.dtype} with {value.numel()} elements"
            _checks.reject(ValueError, op, name, "be one floating-point number", got)
    if seed is not None and (seed.dtype is not torch.int64 or seed.dim() != 0):
        _checks.reject(ValueError, op, "seed", "be a 0-dim int64 tensor", seed.dtype)
    for i in range(count):
        # Lists are long, and a fault is rare: one that is like the first needs no closer look.
        if i == 0 or not _like_the_first(i, params, grads, exp_avgs, exp_avg_sqs):
            _one(i, params, grads, exp_avgs, exp_avg_sqs, len(remainders) > 0, seed is not None)
        if quantized:
            rows, cols = _checks.rows_of(params[i].shape)
            blocks = rows * -(-cols // blocksize)
            for name, tensor in (
                ("exp_avg_absmaxes", exp_avg_absmaxes[i]),
                ("exp_avg_sq_absmaxes", exp_avg_sq_absmaxes[i]),
            ):
                _checks.buffer(op, f"{name}[{i}]", tensor, torch.float32, blocks, params[i].device)
        if len(remainders) > 0:
            name = f"remainders[{i}]"
            _checks.buffer(
                op, name, remainders[i], torch.int16, params[i].numel(), params[i].device
            )
        if not 1 <= steps[i] <= _LARGEST:
            _checks.reject(ValueError, op, f"steps[{i}]", "be in [1, 2^31)", steps[i])
        if not 0 <= parameter_ids[i] <= _LARGEST:
            _checks.reject(
                ValueError, op, f"parameter_ids[{i}]", "be in [0, 2^31)", parameter_ids[i]
            )
        if first_elements[i] < 0:
            _checks.reject(
                ValueError, op, f"first_elements[{i}]", "be at least 0", first_elements[i]
            )


def _scalars(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            _checks.reject(ValueError, _OP_NAME, name, "be a finite number of at least 0", value)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            _checks.reject(ValueError, _OP_NAME, name, "be in [0, 1)", value)
    if not 0 < eps < float("inf"):
        _checks.reject(ValueError, _OP_NAME, "eps", "be a finite number above 0", eps)


def _like_the_first(
    i: int, params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors
) -> bool:
    """Whether `_one` has nothing against a parameter when it has nothing against the first."""
    param, grad, exp_avg, exp_avg_sq = params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]
    state = exp_avg.dtype
    return (
        param.dtype is params[0].dtype
        and grad.dtype is grads[0].dtype
        and state is exp_avgs[0].dtype
        and state is exp_avg_sq.dtype
        and param.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape
        and param.device == grad.device == exp_avg.device == exp_avg_sq.device
        and param.is_contiguous()
        and exp_avg.is_contiguous()
        and exp_avg_sq.is_contiguous()
    )


def _one(
    i: int,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    has_remainders: bool,
    has_seed: bool,
) -> None:
    """Check what one parameter brings; the first one's dtypes hold for all of the list."""
    op, param, grad = _OP_NAME, params[i], grads[i]
    if param.dtype not in (torch.float32, torch.bfloat16):
        rule = "be torch.float32 or torch.bfloat16"
        _checks.reject(TypeError, op, f"params[{i}]", rule, param.dtype)
    if has_remainders and param.dtype is not torch.bfloat16:
        _checks.reject(
            TypeError, op, f"params[{i}]", "be torch.bfloat16 with remainders", param.dtype
        )
    if param.dtype is torch.bfloat16 and not has_remainders and not has_seed:
        rule = "come with remainders or a seed for stochastic rounding when they are torch.bfloat16"
        _checks.reject(ValueError, op, "params", rule, "neither")
    _checks.floating(op, f"grads[{i}]", grad)
    if exp_avgs[i].dtype not in _STATES:
        rule = "be torch.float32, torch.bfloat16 or torch.uint8"
        _checks.reject(TypeError, op, f"exp_avgs[{i}]", rule, exp_avgs[i].dtype)
    same = (("params", params), ("grads", grads), ("exp_avgs", exp_avgs))
    for name, tensors in same:
        if tensors[i].dtype is not tensors[0].dtype:
            rule = f"be {tensors[0].dtype} like the first of the list"
            _checks.reject(TypeError, op, f"{name}[{i}]", rule, tensors[i].dtype)
    if exp_avg_sqs[i].dtype is not exp_avgs[i].dtype:
        rule = f"be {exp_avgs[i].dtype} as exp_avgs[{i}] is"
        _checks.reject(TypeError, op, f"exp_avg_sqs[{i}]", rule, exp_avg_sqs[i].dtype)
    others = (("grads", grad), ("exp_avgs", exp_avgs[i]), ("exp_avg_sqs", exp_avg_sqs[i]))
    for name, tensor in others:
        if tensor.shape != param.shape:
            rule = f"have the parameter's shape {tuple(param.shape)}"
            _checks.reject(ValueError, op, f"{name}[{i}]", rule, tuple(tensor.shape))
        if tensor.device != param.device:
            _checks.same_device(op, f"{name}[{i}]", tensor, param.device)
    mutated = (("params", param), ("exp_avgs", exp_avgs[i]), ("exp_avg_sqs", exp_avg_sqs[i]))
    for name, tensor in mutated:
        if not tensor.is_contiguous():
            got = f"strides {tuple(tensor.stride())}"
            _checks.reject(ValueError, op, f"{name}[{i}]", "be contiguous", got)


def _fake(*args: object, **kwargs: object) -> None:
    """Nothing is returned."""


_OP = register_op(
    _OP_NAME,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes, Tensor(f!)[] remainders, "
    "SymInt[] steps, SymInt[] parameter_ids, SymInt[] first_elements, Tensor? seed=None, "
    "Tensor? clip_coef=None, Tensor? grad_scale=None, Tensor? found_inf=None, *, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, SymInt blocksize=256, "
    "bool maximize=False) -> ()",
    check=_check,
    reference=reference.adamw_step,
    cpp=cpp.adamw_step,
    fake=_fake,
    triton="feinwerk.ops.adamw_step.triton",
)


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors = (),
    exp_avg_sq_absmaxes: Tensors = (),
    remainders: Tensors = (),
    *,
    steps: Sequence[int],
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    blocksize: int = 256,
    maximize: bool = False,
    parameter_ids: Sequence[int] | None = None,
    first_elements: Sequence[int] | None = None,
    seed: torch.Tensor | None = None,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Do one AdamW step over a list of parameters, in place and in one pass over the memory.

        g = grad * clip_coef / grad_scale
        m = m + (g - m) (1 - beta1)
        v = v beta2 + g^2 (1 - beta2)
        p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    in fp32, one rounding an operation, so that every backend gives the same bits. States are
    fp32, bf16 (rounded to nearest) or 8-bit codes into the dynamic maps, `codebook * absmax` in
    blocks of `blocksize` that never cross a row (dimension 0; a vector is one row). Codes are the
    nearest, ties to the lower, but a positive v never takes the code of zero: it would divide by
    eps alone. NaN is kept as zero, and a block in which m or v overflows to infinity becomes zero
    in both. A parameter is updated from v and m before they are rounded.

    bf16 parameters come with `remainders`, int16, the lower half of an fp32 master of which the
    parameter is the upper half rounded to nearest; or with a `seed`: then they are rounded up or
    down at random by the Philox word of (seed, step, parameter id, global element index), the
    same on every rank and world size. All tensors of a list have one dtype.

    Args:
        params: fp32 or bf16, any shape, contiguous.
        grads: fp32, bf16 or fp16, the parameters' shapes.
        exp_avgs: m: fp32, bf16 or uint8 codes (signed dynamic map), the parameters' shapes.
        exp_avg_sqs: v, likewise (unsigned dynamic map).
        exp_avg_absmaxes: with codes, fp32 with rows * ceil(row length / blocksize) elements.
        exp_avg_sq_absmaxes: with codes, likewise.
        remainders: int16 like the parameters, or empty.
        steps: t of each parameter, this step included, at least 1.
        lr: learning rate.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        eps: above 0.
        weight_decay: decoupled.
        blocksize: elements per absmax, any positive number.
        maximize: ascend instead of descend.
        parameter_ids: of each parameter, for `seed`; default 0, 1, 2 ...
        first_elements: index of the first element in the whole (unsharded) parameter; default 0.
        seed: 0-dim int64, for stochastic rounding of bf16 parameters.
        clip_coef: one number that multiplies the gradients.
        grad_scale: one number that divides them.
        found_inf: one number; the step is left out unless it is 0.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a list, shape, stride or number breaks its rule.

    Source:
        Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2; 8-bit Optimizers
        via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> p, g = torch.ones(4), torch.ones(4)
        >>> adamw_step([p], [g], [torch.zeros(4)], [torch.zeros(4)], steps=[1], lr=0.1)
        >>> p
        tensor([0.8990, 0.8990, 0.8990, 0.8990])
    """
    count = len(params)
    with torch.no_grad():
        _OP(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(exp_avg_absmaxes),
            list(exp_avg_sq_absmaxes), list(remainders), list(steps),
            list(range(count)) if parameter_ids is None else list(parameter_ids),
            [0] * count if first_elements is None else list(first_elements),
            seed, clip_coef, grad_scale, found_inf, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, blocksize=blocksize, maximize=maximize,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        for tensors in (
            params,
            exp_avgs,
            exp_avg_sqs,
            exp_avg_absmaxes,
            exp_avg_sq_absmaxes,
            remainders,
        ):
            if len(tensors):
                torch.autograd.graph.increment_version(tensors)
