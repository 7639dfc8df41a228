"""The only importer of the native module `_C` and the only caller of `data_ptr()`.

Every function here takes tensors that an op has already checked, makes them contiguous, allocates
the outputs and hands addresses and sizes to the C core, which validates the sizes once more before
it reads. torch is imported before `_C`, so that the core finds torch's OpenMP runtime.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from feinwerk._checks import rows_of

try:
    from feinwerk import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _why: str | None = f"the native module cannot be loaded: {error}"
else:
    _why = None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RULES = {"cpu": 0, "cuda": 1}
_COMPUTES = {"exact": 0, "int8": 1}
_NO_ADDRESS = 0
_ALIGNMENT = 64
# Codes of this size are read end to end at every call: in 2 MB pages, with fewer page walks.
_LARGE = 4 << 20
# From this size on the C library maps every allocation anew, so its pages are fresh each time.
_ALWAYS_MAPPED = 32 << 20

Nested = tuple[Tensor | None, Tensor | None, Tensor | None]


def available() -> bool:
    """Whether the native module is loaded."""
    return _C is not None


def why_unavailable() -> str | None:
    """Why the native module is not loaded, or None when it is."""
    return _why


def version() -> str:
    """The version of the native core."""
    return _C.version()


def isas() -> list[str]:
    """Instruction sets that this build and this CPU share, in ascending order of preference."""
    return _C.isas() if _C is not None else []


def isa() -> str:
    """The instruction set in use.

    Raises:
        ValueError: `FEINWERK_ISA` names an unknown one.
        NotImplementedError: this CPU lacks the one that `FEINWERK_ISA` names.
    """
    return _C.isa()


def force_isa(name: str | None) -> None:
    """Forces an instruction set for the whole process; None returns to the default choice."""
    _C.force_isa(name)


def openmp() -> str:
    """One sentence on how the core's threads run."""
    return _C.openmp()


def _empty(shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    """On CPU whatever `torch.device(...)` context or default device the caller is in."""
    size = (shape,) if isinstance(shape, int) else shape
    return torch.empty(size, dtype=dtype, device="cpu")


def nf4_quantize(
    weight: Tensor, blocksize: int, rule: str, allow_non_finite: bool
) -> tuple[Tensor, Tensor]:
    """Packed codes [ceil(n / 2)] and absmax [ceil(n / blocksize)] of a weight of n elements."""
    weight = weight.contiguous()
    count = weight.numel()
    packed = _empty((count + 1) // 2, torch.uint8)
    if packed.nbytes >= _LARGE:
        _C.advise_huge_pages(packed.data_ptr(), packed.nbytes)
    absmax = _empty(-(-count // blocksize), torch.float32)
    _C.nf4_quantize(
        weight.data_ptr(),
        _DTYPES[weight.dtype],
        count,
        blocksize,
        _RULES[rule],
        allow_non_finite,
        packed.data_ptr(),
        packed.numel(),
        absmax.data_ptr(),
        absmax.numel(),
        torch.get_num_threads(),
    )
    return packed, absmax


class _Weight:
    """The C view of an NF4 weight; holds the tensors whose addresses it names."""

    __slots__ = ("fields", "tensors")

    def __init__(
        self, packed: Tensor, absmax: Tensor, nested: Nested, rows: int, cols: int, blocksize: int
    ) -> None:
        packed, absmax = packed.contiguous(), absmax.contiguous()
        address = absmax.data_ptr()
        self.tensors: tuple[Tensor, ...]
        nested_absmax, nested_codebook, nested_offset = nested
        if nested_absmax is None or nested_codebook is None or nested_offset is None:
            self.tensors = (packed, absmax)
            tail = (address, _NO_ADDRESS, absmax.numel(), _NO_ADDRESS, 0, _NO_ADDRESS, _NO_ADDRESS)
        else:
            nested_absmax = nested_absmax.contiguous()
            nested_codebook = nested_codebook.contiguous()
            self.tensors = (packed, absmax, nested_absmax, nested_codebook, nested_offset)
            tail = (
                _NO_ADDRESS,
                address,
                absmax.numel(),
                nested_absmax.data_ptr(),
                nested_absmax.numel(),
                nested_codebook.data_ptr(),
                nested_offset.data_ptr(),
            )
        self.fields = (rows, cols, blocksize, packed.data_ptr(), packed.numel(), *tail)


class _Scratch(threading.local):
    """Each thread's workspace, kept between calls: fresh pages cost more than a small product."""

    buffer: Tensor | None = None

    def at_least(self, size: int) -> int:
        """The aligned address of `size` bytes that the thread's next call may use again."""
        buffer = self.buffer
        if buffer is None or buffer.numel() < size + _ALIGNMENT:
            # The old one first, so that both are never held.
            self.buffer = buffer = None
            self.buffer = buffer = _empty(size + _ALIGNMENT, torch.uint8)
        address = buffer.data_ptr()
        return address + -address % _ALIGNMENT

    def run(self, call: Callable[[int, int], int]) -> None:
        """Call with (address, size) of the workspace; once more when it returns a larger size."""
        buffer = self.buffer
        held = 0 if buffer is None else buffer.numel() - _ALIGNMENT
        del buffer  # it must not outlive its place in self.buffer
        need = call(self.at_least(held) if held > 0 else _NO_ADDRESS, held)
        if need:
            call(self.at_least(need), need)


_scratch = _Scratch()


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight in `dtype`, of `shape`."""
    out = _empty(shape, dtype)
    if out.nbytes >= _ALWAYS_MAPPED:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    nested = (nested_absmax, nested_codebook, nested_offset)
    weight = _Weight(packed, absmax, nested, 1, out.numel(), blocksize)
    _C.nf4_dequantize(
        weight.fields, out.data_ptr(), _DTYPES[dtype], out.numel(), torch.get_num_threads()
    )
    return out


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    compute: str,
) -> Tensor:
    """y[..., N] = x[..., K] @ W^T + bias."""
    x = x.contiguous()
    rows = math.prod(x.shape[:-1])
    y = _empty((*x.shape[:-1], N), x.dtype)
    nested = (nested_absmax, nested_codebook, nested_offset)
    weight = _Weight(packed, absmax, nested, N, K, blocksize)
    if bias is not None:
        bias = bias.contiguous()
    threads = torch.get_num_threads()
    dtype, mode = _DTYPES[x.dtype], _COMPUTES[compute]
    size = _C.nf4_linear_workspace(rows, N, K, blocksize, dtype, mode, threads)
    address = _scratch.at_least(size)
    _C.nf4_linear(
        weight.fields,
        x.data_ptr(),
        y.data_ptr(),
        dtype,
        rows,
        _NO_ADDRESS if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        mode,
        address,
        size,
        threads,
    )
    return y


def nf4_linear_backward(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
) -> Tensor:
    """grad_x[..., K] = grad_y[..., N] @ W."""
    grad_y = grad_y.contiguous()
    rows = math.prod(grad_y.shape[:-1])
    grad_x = _empty((*grad_y.shape[:-1], K), grad_y.dtype)
    nested = (nested_absmax, nested_codebook, nested_offset)
    weight = _Weight(packed, absmax, nested, N, K, blocksize)
    threads = torch.get_num_threads()
    dtype = _DTYPES[grad_y.dtype]
    size = _C.nf4_linear_backward_workspace(rows, N, K, blocksize, dtype, threads)
    address = _scratch.at_least(size)
    _C.nf4_linear_backward(
        weight.fields, grad_y.data_ptr(), grad_x.data_ptr(), dtype, rows, address, size, threads
    )
    return grad_x


def nf4_embedding(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """out[..., K] = W[indices, :]."""
    indices = indices.to(torch.int64).contiguous()
    out = _empty((*indices.shape, K), dtype)
    nested = (nested_absmax, nested_codebook, nested_offset)
    weight = _Weight(packed, absmax, nested, N, K, blocksize)
    _C.nf4_embedding(
        weight.fields,
        indices.data_ptr(),
        indices.numel(),
        out.data_ptr(),
        _DTYPES[dtype],
        out.numel(),
        torch.get_num_threads(),
    )
    return out


def blockwise_quantize(
    x: Tensor, codebook: Tensor, blocksize: int, center: bool, rule: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of x, absmax per block, and the mean that was subtracted (0 without center)."""
    x, codebook = x.contiguous(), codebook.contiguous()
    codes = _empty(x.shape, torch.uint8)
    rows, row_length = rows_of(x.shape, layout)
    blocks = -(-row_length // blocksize)
    absmax = _empty((rows, blocks) if layout == "rows" else blocks, torch.float32)
    offset = _empty((), torch.float32)
    _C.blockwise_quantize(
        x.data_ptr(),
        x.numel(),
        blocksize,
        row_length,
        codebook.data_ptr(),
        _RULES[rule],
        center,
        codes.data_ptr(),
        absmax.data_ptr(),
        absmax.numel(),
        offset.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax, offset


def blockwise_dequantize(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    offset: Tensor | None,
    blocksize: int,
    layout: str,
) -> Tensor:
    """codebook[codes] * absmax + offset in fp32."""
    codes, absmax, codebook = codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    out = _empty(codes.shape, torch.float32)
    _C.blockwise_dequantize(
        codes.data_ptr(),
        codes.numel(),
        blocksize,
        rows_of(codes.shape, layout)[1],
        codebook.data_ptr(),
        absmax.data_ptr(),
        absmax.numel(),
        _NO_ADDRESS if offset is None else offset.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def nf4_linear_workspace(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    compute: str = "exact",
    threads: int = 1,
    blocksize: int = 64,
) -> int:
    """Scratch bytes of nf4_linear."""
    return _C.nf4_linear_workspace(M, N, K, blocksize, _DTYPES[dtype], _COMPUTES[compute], threads)


def nf4_linear_backward_workspace(
    M: int, N: int, K: int, dtype: torch.dtype, threads: int = 1, blocksize: int = 64
) -> int:
    """Scratch bytes of nf4_linear_backward."""
    return _C.nf4_linear_backward_workspace(M, N, K, blocksize, _DTYPES[dtype], threads)
