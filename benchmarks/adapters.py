"""One adapter problem: a layer in NF4 with LoRA or DoRA, Feinwerk's candidate, and the check first.

All candidates hold the same weight and the same adapters in fp32, as PEFT trains them. A *step* is
a forward and every gradient that training asks for: of x, of A and B, and of DoRA's magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import feinwerk
from benchmarks.harness import Candidate, copies_beyond_cache
from benchmarks.problem import copy_of, nf4_weight, rounded_weight
from feinwerk import ops, testing

RANK, SCALING = 16, 2.0  # lora_alpha = 32
BLOCKSIZE = 64
STEP = "forward+backward"

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """A [r, K] and B [N, r] in fp32; magnitude [N] for DoRA."""

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self.A, self.B] + ([] if self.magnitude is None else [self.magnitude])


@dataclass(frozen=True)
class AdapterProblem:
    """y = x W^T + scaling (x A^T) B^T, for DoRA times magnitude / norm; with all gradients or not.

    Args:
        N: rows of the weight.
        K: columns of the weight.
        M: rows of x, divided evenly among the adapters.
        dtype: of x and y.
        dora: with a magnitude.
        backward: time a whole step instead of the forward without gradients.
        count: adapters in the batch.
        cold: hold copies of weight and adapters beyond the cache.
        cache_bytes: size of the cache.
    """

    N: int
    K: int
    M: int
    dtype: torch.dtype
    dora: bool = False
    backward: bool = True
    count: int = 1
    cold: bool = True
    cache_bytes: int = 0

    @property
    def copies(self) -> int:
        """Copies of the packed weight."""
        if not self.cold:
            return 1
        return copies_beyond_cache(self.N * self.K // 2, self.cache_bytes)

    @property
    def operations(self) -> float:
        """Two base products in a step, one in a forward; of the adapters' six, two."""
        base, low_rank = self.M * self.N * self.K, self.M * RANK * (self.N + self.K)
        return 2.0 * (base * (1 + self.backward) + low_rank * (1 + 2 * self.backward))

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that must be read and written: weight and adapters, x and y, their gradients."""
        size, passes = self.dtype.itemsize, 1 + self.backward
        adapters = 4 * self.count * (RANK * (self.N + self.K) + self.N * self.dora)
        weight = nf4_weight(self.N, self.K, BLOCKSIZE).nbytes
        inputs, outputs = self.M * self.K * size, self.M * self.N * size
        reads = passes * (weight + adapters + inputs) + (outputs if self.backward else 0)
        return reads, outputs + (inputs + adapters if self.backward else 0)

    def x(self) -> torch.Tensor:
        """Activations [count, M / count, K], or [M, K] for one adapter."""
        x = torch.randn(self.M, self.K, generator=torch.Generator().manual_seed(self.M))
        return self._by_adapter(x.to(self.dtype))

    def grad_y(self) -> torch.Tensor:
        """The gradient that comes back."""
        dy = torch.randn(self.M, self.N, generator=torch.Generator().manual_seed(self.M + 1))
        return self._by_adapter(dy.to(self.dtype))

    def _by_adapter(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.count == 1 else rows.view(self.count, -1, rows.shape[-1])

    def adapters(self) -> list[Adapter]:
        """Fresh adapters, always of the same values: some way into training, B is not zero."""
        generator = torch.Generator().manual_seed(self.N + self.K)
        made = []
        for _ in range(self.count):
            A = torch.randn(RANK, self.K, generator=generator) / self.K**0.5
            B = torch.randn(self.N, RANK, generator=generator) / (4 * RANK**0.5)
            tensors = [A, B]
            if self.dora:
                gain = 1 + 0.1 * torch.randn(self.N, generator=generator)
                tensors.append(gain * base_norm(self.N, self.K))
            made.append(Adapter(*(tensor.requires_grad_() for tensor in tensors)))
        return made

    def alone(self) -> AdapterProblem:
        """One adapter's share of the batch."""
        return replace(self, M=self.M // self.count, count=1)

    def candidate(
        self, name: str, layers: Sequence[tuple[Layer, Sequence[torch.Tensor]]], note: str = ""
    ) -> Candidate:
        """Time layers in turn, each given with the tensors whose gradients a step computes."""
        x, dy = self.x(), self.grad_y()
        calls: list[Callable[[], object]] = []
        for layer, trained in layers:
            if self.backward:
                calls.append(
                    functools.partial(step, layer, x.clone().requires_grad_(), dy, trained)
                )
            else:
                calls.append(functools.partial(forward, layer, x))
        return Candidate(name, calls, note=note)


def step(
    layer: Layer, x: torch.Tensor, dy: torch.Tensor, trained: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return y, dX and the gradients of what is trained, none of which keeps the step's graph.

    While a graph lives the nodes of its leaves do, which a capture of another step would meet.
    """
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *trained], dy))


def forward(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The product alone, without gradients."""
    with torch.no_grad():
        return (layer(x),)


@functools.lru_cache(maxsize=2)
def base_norm(N: int, K: int) -> torch.Tensor:
    """||W_i|| of the NF4 weight."""
    return ops.row_norms(*tables(nf4_weight(N, K, BLOCKSIZE)), shape=(N, K), blocksize=BLOCKSIZE)


def tables(weight: feinwerk.NF4Weight) -> tuple[torch.Tensor | None, ...]:
    """The weight's tensors in the ops' order."""
    nested = (weight.nested_absmax, weight.nested_codebook, weight.nested_offset)
    return (weight.packed, weight.absmax, *nested)


def nf4_alone(problem: AdapterProblem) -> Candidate:
    """The frozen NF4 layer without adapter: y, and dX in a step."""
    weight = nf4_weight(problem.N, problem.K, BLOCKSIZE)
    layers = [(copy_of(weight).linear, ()) for _ in range(problem.copies)]
    return problem.candidate("NF4 alone", layers)


def ours(problem: AdapterProblem) -> Candidate:
    """lora_linear, dora_linear or, for more adapters than one, grouped_lora_linear."""
    weight = nf4_weight(problem.N, problem.K, BLOCKSIZE)
    layers = [layer_of(problem, copy_of(weight)) for _ in range(problem.copies)]
    return problem.candidate("feinwerk", layers)


def layer_of(
    problem: AdapterProblem, weight: feinwerk.NF4Weight
) -> tuple[Layer, list[torch.Tensor]]:
    """Our op on this weight with adapters of its own, and what it trains.

    DoRA's norm is taken in every call of a step, and known in a forward without gradients, as
    training and inference do it.
    """
    packed, absmax, *nested = tables(weight)
    quantized = dict(
        zip(("nested_absmax", "nested_codebook", "nested_offset"), nested, strict=True),
        absmax=absmax, blocksize=BLOCKSIZE,
    )  # fmt: skip
    adapters = problem.adapters()
    trained = [tensor for adapter in adapters for tensor in adapter.tensors]
    if problem.count > 1:
        layer = functools.partial(
            _grouped, packed=packed, adapters=adapters, index=torch.arange(problem.count),
            **quantized,
        )  # fmt: skip
        return layer, trained
    (one,) = adapters
    if one.magnitude is None:
        return functools.partial(
            ops.lora_linear, weight=packed, lora_A=one.A, lora_B=one.B, scaling=SCALING,
            **quantized,
        ), trained  # fmt: skip
    norm = base_norm(problem.N, problem.K).clone()
    known = None
    if not problem.backward:
        known = ops.weight_norm(
            packed, one.A, one.B, scaling=SCALING, base_norm=norm, dtype=problem.dtype, **quantized
        )
    return functools.partial(
        ops.dora_linear, weight=packed, lora_A=one.A, lora_B=one.B, magnitude=one.magnitude,
        base_norm=norm, weight_norm=known, scaling=SCALING, **quantized,
    ), trained  # fmt: skip


def _grouped(
    x: torch.Tensor,
    *,
    packed: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor,
    **quantized: object,
) -> torch.Tensor:
    A, B = [adapter.A for adapter in adapters], [adapter.B for adapter in adapters]
    return ops.grouped_lora_linear(
        x, packed, A, B, index, scaling=[SCALING] * len(adapters), **quantized
    )


def plain(
    W: torch.Tensor, adapter: Adapter, dtype: torch.dtype, *, sizes: bool = False
) -> tuple[Layer, list[torch.Tensor]]:
    """The formula in plain torch, arithmetic and adapters in `dtype`; DoRA's norm detached.

    With `sizes`, of absolute values (but the norm): each result is then the sum of its terms' size.
    """
    A, B, *magnitude = (tensor.detach().to(dtype) for tensor in adapter.tensors)
    W = W.to(dtype)
    norm = torch.linalg.norm(W + SCALING * B @ A, dim=1) if magnitude else None
    trained = [tensor.abs() if sizes else tensor.clone() for tensor in (A, B, *magnitude)]
    A, B, *magnitude = (tensor.requires_grad_() for tensor in trained)
    W = W.abs() if sizes else W

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, W) + SCALING * F.linear(F.linear(x, A), B)
        return magnitude[0] / norm * y if magnitude else y

    return layer, trained


def check(problem: AdapterProblem, results: Sequence[torch.Tensor]) -> None:
    """Raise AssertionError unless y and every gradient are within the budget of docs/numerics.md.

    The budget of each, all as norms: twice the error of plain torch in the activations' dtype, one
    unit in the last place, and 4 sqrt(depth) 2^-24 times the sum of the terms' sizes.

    Args:
        problem: what is computed.
        results: of one call of ours(); for several adapters their first and last are compared.
    """
    W = rounded_weight(problem.N, problem.K, BLOCKSIZE, problem.dtype)
    adapters, alone = problem.adapters(), problem.alone()
    x = problem.x().view(problem.count, alone.M, problem.K)
    dy = problem.grad_y().view(problem.count, alone.M, problem.N)
    each = len(adapters[0].tensors)
    M, N, K = alone.M, problem.N, problem.K
    depths = {"y": K + RANK, "dX": N + RANK, "dA": N + M, "dB": K + M, "dm": K + RANK + M}
    y, *grads = (result.detach() for result in results)
    for i in sorted({0, problem.count - 1}):
        mine = [y.view(problem.count, M, -1)[i]]
        if problem.backward:
            mine.append(grads[0].view(problem.count, M, -1)[i])
            mine += grads[1 + i * each : 1 + (i + 1) * each]
        values = []
        for dtype, sizes in ((torch.float64, False), (problem.dtype, False), (torch.float64, True)):
            layer, trained = plain(W, adapters[i], dtype, sizes=sizes)
            leaf, back = x[i].to(dtype), dy[i].to(dtype)
            if sizes:
                leaf, back = leaf.abs(), back.abs()
            if problem.backward:
                values.append(step(layer, leaf.clone().requires_grad_(), back, trained))
            else:
                values.append(forward(layer, leaf))
        for (name, depth), ours_, *others in zip(depths.items(), mine, *values, strict=False):
            compare_norms(name, ours_, *(tensor.detach() for tensor in others), depth=depth)


def compare_norms(
    name: str,
    mine: torch.Tensor,
    truth: torch.Tensor,
    theirs: torch.Tensor,
    size: torch.Tensor,
    *,
    depth: int,
) -> None:
    """Raise AssertionError if ours is further from the truth than its budget, see check()."""
    if mine.shape != truth.shape:
        raise AssertionError(f"{name}: expected {tuple(truth.shape)}, got {tuple(mine.shape)}")
    error = (mine.double() - truth).norm()
    allowed = 2 * (theirs.double() - truth).norm() + testing.ulp(truth, mine.dtype).norm()
    allowed = allowed + 4 * depth**0.5 * 2.0**-24 * size.norm()
    if not bool(error <= allowed):
        raise AssertionError(f"{name}: error {float(error):.3g}, allowed {float(allowed):.3g}")
