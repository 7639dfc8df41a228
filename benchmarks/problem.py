"""One matmul to time: its weight, its activations, Feinwerk's own candidate, and the check first.

All candidates hold the same weight: a Gaussian matrix, quantized once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import feinwerk
from benchmarks.harness import Candidate, copies_beyond_cache
from feinwerk import testing
from feinwerk.ops.nf4_dequantize.reference import decode_absmax

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_ROWS = 16
CHECKED_COLUMNS = 192

Call = Callable[[], object]
Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """y[M,N] = x[M,K] @ W[N,K]^T, or dX[M,K] = dY[M,N] @ W.

    Args:
        N: rows of the weight.
        K: columns of the weight.
        M: rows of x.
        dtype: of x and y.
        backward: time dX instead of y.
        blocksize: elements per absmax.
        cold: hold copies of the weight beyond the cache.
        cache_bytes: size of the cache.
    """

    N: int
    K: int
    M: int
    dtype: torch.dtype
    backward: bool = False
    blocksize: int = 64
    cold: bool = True
    cache_bytes: int = 0

    def copies(self, weight_bytes: float) -> int:
        """Copies that a weight of this size needs, one when warm."""
        return copies_beyond_cache(int(weight_bytes), self.cache_bytes) if self.cold else 1

    @property
    def nf4_copies(self) -> int:
        """Copies of the packed weight."""
        return self.copies(self.N * self.K * 0.5)

    @property
    def operations(self) -> float:
        """Floating-point operations: a multiply and an add for every weight and row."""
        return 2.0 * self.M * self.N * self.K

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that must be read and written: the weight with its scales, x and y."""
        weight = nf4_weight(self.N, self.K, self.blocksize).nbytes
        size = self.dtype.itemsize
        inner, outer = (self.N, self.K) if self.backward else (self.K, self.N)
        return weight + self.M * inner * size, self.M * outer * size

    def activations(self) -> torch.Tensor:
        """x, or dY for dX."""
        generator = torch.Generator().manual_seed(self.M)
        shape = (self.M, self.N if self.backward else self.K)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def calls(self, layers: Sequence[Layer]) -> list[Call]:
        """Forward calls without gradient, or dX as training runs it: through autograd."""
        x = self.activations()
        if not self.backward:
            return [functools.partial(_without_grad, layer, x) for layer in layers]
        calls = []
        for layer in layers:
            leaf = torch.zeros(self.M, self.K, dtype=self.dtype, requires_grad=True)
            y = layer(leaf)
            calls.append(functools.partial(_input_grad, y, leaf, x))
        return calls


def _without_grad(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def _input_grad(y: torch.Tensor, leaf: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]


@functools.lru_cache(maxsize=2)
def dense_weight(N: int, K: int) -> torch.Tensor:
    """The fp32 weight: Gaussian, of the usual size for a layer of K inputs."""
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7)) / K**0.5


@functools.lru_cache(maxsize=4)
def nf4_weight(
    N: int, K: int, blocksize: int = 64, double_quant: bool = True
) -> feinwerk.NF4Weight:
    """The same weight in NF4."""
    return feinwerk.NF4Weight.from_dense(
        dense_weight(N, K), blocksize=blocksize, double_quant=double_quant
    )


def copy_of(weight: feinwerk.NF4Weight) -> feinwerk.NF4Weight:
    """The same weight in memory of its own, as quantizing leaves it."""
    dense = dense_weight(*weight.shape)
    return feinwerk.NF4Weight.from_dense(
        dense, blocksize=weight.blocksize, double_quant=weight.double_quant
    )


def ours(problem: Problem, compute: str = "exact") -> Candidate:
    """feinwerk.nf4_linear on the double-quantized weight, as NF4Weight calls it."""
    weight = nf4_weight(problem.N, problem.K, problem.blocksize)
    layers = [
        functools.partial(copy_of(weight).linear, compute=compute)
        for _ in range(problem.nf4_copies)
    ]
    return Candidate("feinwerk", problem.calls(layers))


@functools.lru_cache(maxsize=1)
def rounded_weight(N: int, K: int, blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    """W~ as a matrix, its first rows compared with the reference bit for bit."""
    weight = nf4_weight(N, K, blocksize)
    dense = weight.dequantize(dtype)
    rows = min(N, 64)
    blocks = -(-rows * K // blocksize)
    with testing.use_backend("reference"):
        head = replace(
            weight,
            packed=weight.packed.flatten()[: (rows * K + 1) // 2].clone(),
            absmax=weight.absmax[:blocks].clone(),
            nested_absmax=weight.nested_absmax[: -(-blocks // 256)].clone(),
            shape=(rows, K),
        )
        testing.assert_same_bits(dense[:rows], head.dequantize(dtype), "dequantized weight")
    return dense


def check(problem: Problem, candidate: Candidate, compute: str = "exact") -> None:
    """Raise AssertionError unless a sample of our result is within the error budget.

    Args:
        problem: what is computed.
        candidate: from ours().
        compute: "exact" or "int8".
    """
    N, K = problem.N, problem.K
    dense = rounded_weight(N, K, problem.blocksize, problem.dtype)
    generator = torch.Generator().manual_seed(problem.M + N + K)
    width = K if problem.backward else N
    columns = torch.randperm(width, generator=generator)[:CHECKED_COLUMNS].sort().values
    rows = torch.randperm(problem.M, generator=generator)[:CHECKED_ROWS].sort().values
    weight = dense[:, columns].t().contiguous() if problem.backward else dense[columns]
    scales = None
    if compute == "int8":
        stored = nf4_weight(N, K, problem.blocksize)
        nested = (stored.nested_absmax, stored.nested_codebook, stored.nested_offset)
        absmax = decode_absmax(stored.absmax, *nested).double()
        element = columns[:, None] * K + torch.arange(K)
        scales = absmax[element // problem.blocksize]
    result = candidate.calls[0]()
    if not isinstance(result, torch.Tensor):
        raise AssertionError(f"expected a tensor, got {type(result).__name__}")
    sample = result[rows][:, columns]
    testing.assert_within_budget(sample, problem.activations()[rows], weight, scales=scales)
