"""Input makers, backend selection and THE error budget; shared by tests and benchmarks.

The budget of docs/numerics.md lives here and nowhere else: no test has a tolerance of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from feinwerk import _library, _native
from feinwerk.codebook import BLOCKSIZES, dynamic_map
from feinwerk.ops import blockwise_quantize, nf4_dequantize, nf4_linear, nf4_quantize
from feinwerk.ops.nf4_dequantize.reference import decode_absmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, K): one element, odd, prime, blocks that cross rows, one panel and a little more.
SHAPES = ((1, 1), (1, 64), (3, 17), (7, 96), (31, 97), (64, 64), (33, 130), (48, 576), (130, 320))

# Rows of x: none, one, the small-M kernels and their edges, one past a tile.
ROWS = (0, 1, 2, 3, 4, 5, 8, 16, 17, 33)

# compute="int8" holds the codebook as 8-bit integers at scale 127, each off by at most half a step.
INT8_TABLE_ERROR = 0.5 / 127
INT8_BLOCK = 64


def backend_ids() -> list[str]:
    """Return every backend that runs here: `reference` and `cpp-<isa>`, ISAs ascending.

    With TRITON_INTERPRET=1 it is `triton-interpret` alone: that wants a process of its own.

    Returns:
        Names for `use_backend`, also used as test ids and plot labels.

    Example:
        >>> bool(backend_ids())
        True
    """
    if _library.interpreting():
        return ["triton-interpret"]
    return ["reference", *(f"cpp-{isa}" for isa in (_native.isas() if _native.available() else []))]


@contextmanager
def use_backend(name: str) -> Iterator[str]:
    """Run the CPU ops inside the block on one backend, and on one ISA for `cpp-<isa>`.

    Args:
        name: one of `backend_ids()`.

    Yields:
        The name.

    Raises:
        NotImplementedError: if the native extension is not available.
        ValueError: if there is no such backend.
        RuntimeError: if the ISA that was asked for did not become the active one.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    backend, _, isa = name.partition("-")
    before = _library.forced_backend()
    _library.force_backend(backend)
    try:
        if backend == "cpp" and isa:
            _native.force_isa(isa)
            if _native.isa() != isa:
                raise RuntimeError(f"use_backend: {isa} must be active, got {_native.isa()}")
        yield name
    finally:
        _library.force_backend(before)
        if backend == "cpp" and isa:
            _native.force_isa(None)


@dataclass(frozen=True, eq=False)
class WeightCase:
    """An NF4 weight as the ops take it, with its exact fp32 values beside it."""

    N: int
    K: int
    blocksize: int
    packed: torch.Tensor
    absmax: torch.Tensor
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None]

    @property
    def tables(self) -> tuple[torch.Tensor | None, ...]:
        """packed, absmax and the three nested tensors, in the ops' order."""
        return (self.packed, self.absmax, *self.nested)

    @property
    def sizes(self) -> dict[str, int]:
        """The keyword arguments N, K and blocksize."""
        return {"N": self.N, "K": self.K, "blocksize": self.blocksize}

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, compute: str = "exact"
    ) -> torch.Tensor:
        """Call nf4_linear with this weight."""
        return nf4_linear(
            x,
            self.packed,
            self.absmax,
            bias,
            *self.nested,
            N=self.N,
            K=self.K,
            blocksize=self.blocksize,
            compute=compute,
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019 (identity hash; 64 cases at most are kept)
    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return W~ from the reference: the exact product, rounded once to dtype."""
        with use_backend("reference"):
            return nf4_dequantize(
                self.packed,
                self.absmax,
                *self.nested,
                shape=(self.N, self.K),
                blocksize=self.blocksize,
                dtype=dtype,
            )

    def scales(self) -> torch.Tensor:
        """Return the decoded absmax of every weight, fp64 [N, K]."""
        flat = decode_absmax(self.absmax, *self.nested).double().repeat_interleave(self.blocksize)
        return flat[: self.N * self.K].view(self.N, self.K)


@functools.lru_cache(maxsize=64)
def make_weight(
    N: int, K: int, *, blocksize: int = 64, double_quant: bool = False, seed: int = 0
) -> WeightCase:
    """Return a random NF4 weight, the same bytes on every backend; shared, not to be changed.

    Args:
        N: rows.
        K: columns.
        blocksize: elements per absmax.
        double_quant: with a quantized absmax.
        seed: of the generator.

    Returns:
        The weight's tensors and sizes.

    Example:
        >>> make_weight(2, 64).packed.numel()
        64
    """
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(N, K, generator=generator)
    # Rows of different size: a scale taken from a neighbouring block is then far off.
    dense *= torch.rand(N, 1, generator=generator) + 0.25
    with use_backend("reference"):
        packed, absmax = nf4_quantize(dense, blocksize=blocksize)
        if not double_quant:
            return WeightCase(N, K, blocksize, packed, absmax, (None, None, None))
        codebook = dynamic_map()
        codes, nested_absmax, offset = blockwise_quantize(absmax, codebook, center=True)
    return WeightCase(N, K, blocksize, packed, codes, (nested_absmax, codebook, offset))


def make_x(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Return normal random activations.

    Args:
        shape: of the result.
        dtype: of the result.
        seed: of the generator.

    Returns:
        The tensor.

    Example:
        >>> make_x((2, 3), torch.bfloat16).dtype
        torch.bfloat16
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between neighbouring numbers of dtype around |value|, in fp64.

    Args:
        value: fp64.
        dtype: fp32, bf16 or fp16.

    Returns:
        fp64, the shape of value.

    Example:
        >>> ulp(torch.tensor(1.0, dtype=torch.float64), torch.float16)
        tensor(0.0010, dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    size = value.abs().double().clamp(min=info.smallest_normal)
    return torch.ldexp(torch.full_like(size, info.eps), torch.frexp(size).exponent - 1)


def linear_budget(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp64 truth of x @ W~^T + bias and the error that is allowed, per element.

        2 max|torch - y64| + ulp(y64) + 4 sqrt(K) 2^-24 (|x| |W~|^T)

    With `scales`, also the documented error of compute="int8". There the kernel multiplies
    x + dx and W + dW, where, with s the activation scale of a run of 64 elements,

        |dx| <= s / 2,   |dW| <= scales * 0.5 / 127 + (eps / 2) |W~|

    (the second term: W is not rounded to x's dtype there), so that the product differs by at most
    sum |dx| |W~| + (|x| + |dx|) |dW|. Every step is an inequality: the bound is never exceeded.

    Args:
        x: [..., K] in the dtype under test; grad_y for the backward.
        weight: W~ [N, K] in x's dtype; its transpose for the backward.
        bias: [N] or None.
        scales: fp64 [N, K], `WeightCase.scales()`, for compute="int8".

    Returns:
        (truth, budget), fp64 [..., N].

    Example:
        >>> truth, budget = linear_budget(torch.ones(1, 4), torch.ones(2, 4))
        >>> truth
        tensor([[4., 4.]], dtype=torch.float64)
    """
    K = x.shape[-1]
    wide, dense = x.double(), weight.double()
    truth = wide @ dense.t()
    plain = F.linear(x, weight, None if bias is None else bias.to(x.dtype)).double()
    if bias is not None:
        truth = truth + bias.double()
    torch_error = (plain - truth).abs().max() if truth.numel() else truth.new_zeros(())
    size = wide.abs() @ dense.abs().t()
    budget = 2 * torch_error + ulp(truth, x.dtype) + 4 * math.sqrt(K) * 2.0**-24 * size
    if scales is not None:
        budget = budget + int8_error(x, dense, scales)
    return truth, budget


def int8_error(x: torch.Tensor, dense: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the bound on what compute="int8" adds to the error of x @ W~^T, per element.

    Args:
        x: [..., K].
        dense: W~ [N, K], fp64.
        scales: fp64 [N, K], `WeightCase.scales()`.

    Returns:
        fp64 [..., N].

    Example:
        >>> int8_error(torch.zeros(1, 4), torch.ones(2, 4).double(), torch.ones(2, 4).double())
        tensor([[0., 0.]], dtype=torch.float64)
    """
    K, wide = x.shape[-1], x.double().abs()
    runs = F.pad(wide, (0, -K % INT8_BLOCK))
    runs = runs.view(*x.shape[:-1], (K + INT8_BLOCK - 1) // INT8_BLOCK, INT8_BLOCK)
    step = runs.amax(dim=-1).repeat_interleave(INT8_BLOCK, dim=-1)[..., :K] / 127
    dx = step / 2 * (1 + 2.0**-20)  # the scale itself is rounded to fp32
    dw = scales * INT8_TABLE_ERROR + dense.abs() * torch.finfo(x.dtype).eps / 2
    return dx @ dense.abs().t() + (wide + dx) @ dw.t()


def assert_within_budget(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> None:
    """Raise AssertionError unless y is x @ weight^T + bias within the budget, element by element.

    Args:
        y: the result under test.
        x: as in `linear_budget`.
        weight: as in `linear_budget`.
        bias: as in `linear_budget`.
        scales: as in `linear_budget`.

    Raises:
        AssertionError: naming the worst element, its error and its budget.

    Example:
        >>> assert_within_budget(torch.full((1, 2), 4.0), torch.ones(1, 4), torch.ones(2, 4))
    """
    truth, budget = linear_budget(x, weight, bias, scales=scales)
    assert_within(y, truth, budget, x.dtype)


def assert_within(
    actual: torch.Tensor,
    truth: torch.Tensor,
    budget: torch.Tensor,
    dtype: torch.dtype,
    what: str = "result",
) -> None:
    """Raise AssertionError unless actual is of dtype and truth's shape and as near as budget says.

    Args:
        actual: the tensor under test.
        truth: fp64.
        budget: fp64, truth's shape: the error that each element may have.
        dtype: that actual must have.
        what: named in the message.

    Raises:
        AssertionError: naming the worst element, its error and its budget.

    Example:
        >>> one = torch.ones(2)
        >>> assert_within(one, one.double(), one.double() * 0, torch.float32)
    """
    if actual.dtype != dtype or actual.shape != truth.shape:
        raise AssertionError(
            f"{what}: expected {dtype} {tuple(truth.shape)}, "
            f"got {actual.dtype} {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return
    error = (actual.double() - truth).abs()
    ratio = torch.where(error > 0, error / budget, 0.0)
    ratio = torch.where(error.isnan(), math.inf, ratio)
    worst = int(ratio.argmax())
    if not float(ratio.flatten()[worst]) <= 1.0:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        raise AssertionError(
            f"{what}: {int((ratio > 1).sum())} of {actual.numel()} elements beyond the error "
            f"budget; worst at {where}: got {float(actual.flatten()[worst])}, "
            f"truth {float(truth.flatten()[worst])}, error {float(error.flatten()[worst]):.3e} = "
            f"{float(ratio.flatten()[worst]):.2f} x the budget {float(budget.flatten()[worst]):.3e}"
        )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Raise AssertionError unless both hold the same bits; NaNs match in position only.

    Args:
        actual: the tensor under test.
        expected: same dtype and shape.
        what: named in the message.

    Raises:
        AssertionError: counting the differing elements and showing the first.

    Example:
        >>> assert_same_bits(torch.zeros(2), torch.zeros(2))
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: expected {expected.dtype} {tuple(expected.shape)}, "
            f"got {actual.dtype} {tuple(actual.shape)}"
        )
    left, right = actual.contiguous().flatten(), expected.contiguous().flatten()
    if actual.is_floating_point():
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        both_nan = left.isnan() & right.isnan()
        different = (left.view(word) != right.view(word)) & ~both_nan
    else:
        different = left != right
    if bool(different.any()):
        first = int(different.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {left.numel()} elements differ, first at {first}: "
            f"got {left[first].item()!r}, expected {right[first].item()!r}"
        )


def some_blocksizes(full: bool) -> tuple[int, ...]:
    """Return every blocksize, or a few of them for the small test run.

    Args:
        full: all of them.

    Returns:
        Blocksizes, ascending.

    Example:
        >>> some_blocksizes(False)
        (32, 64, 4096)
    """
    return BLOCKSIZES if full else (32, 64, 4096)
