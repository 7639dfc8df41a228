"""What the Triton kernels of two or more ops share: code look-ups, scales, random words, the GPU.

Every `ops/<op>/triton.py` is written with these. Kernels are launched with `enable_fp_fusion=False`
and fuse only through `tl.fma`, so that exact ops have the reference's bits. An offset into memory
is int64 before it is multiplied.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from feinwerk import triton_launch
from feinwerk.codebook import NESTED_BLOCKSIZE, NF4_VALUES, nf4_codebook

# Without the wrapper that initializes CUDA: a tensor is there.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_V0, _V1, _V2, _V3, _V4, _V5, _V6, _V7 = (tl.constexpr(value) for value in NF4_VALUES[:8])
_V8, _V9, _V10, _V11, _V12, _V13, _V14, _V15 = (tl.constexpr(value) for value in NF4_VALUES[8:])
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)


@dataclass(frozen=True)
class Gpu:
    """What a launcher chooses by: `backend` is "cuda", "hip" or "interpreter"."""

    backend: str
    arch: str  # "90" for sm_90, "gfx942"
    multiprocessors: int
    shared_memory: int  # bytes a program may use


# The interpreter stands for a small GPU, so that tests reach several programs with few elements.
_INTERPRETER = Gpu("interpreter", "none", 4, 232448)
_pretended: Gpu | None = None


def pretend(gpu: Gpu | None) -> None:
    """Let launchers choose as on another GPU (compilation ahead of time); None ends it."""
    global _pretended
    _pretended = gpu


def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU that the tensors of a launch live on."""
    if _pretended is not None:
        return _pretended
    return _INTERPRETER if INTERPRETED else _real_gpu(device)


@functools.cache
def _real_gpu(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = found.gcnArchName.partition(":")[0]
        return Gpu("hip", arch, found.multi_processor_count, 65536)
    arch = f"{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 101376)
    return Gpu("cuda", arch, found.multi_processor_count, shared)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on its first tensor's device, without fusing what the source keeps apart."""
    if min(grid) < 1:
        return
    first = args[0]
    if not isinstance(first, torch.Tensor):
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    device = first.device
    options["enable_fp_fusion"] = False
    if device.type != "cuda":
        kernel[grid](*args, **options)
    elif device.index == _current_device():
        triton_launch.run(kernel, grid, device.index, args, options)
    else:
        with torch.cuda.device(device):
            triton_launch.run(kernel, grid, device.index, args, options)


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return where tensors begin, for a kernel that walks a list of them in one launch.

    The caller keeps the tensors alive until it has launched.
    """
    return [tensor.data_ptr() for tensor in tensors]


def upload(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return integers as an int64 tensor on a device, without waiting for it."""
    # Of many integers an array is made faster than a tensor.
    table = torch.frombuffer(array("q", values), dtype=torch.int64)
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


@functools.lru_cache(maxsize=256)
def tiles_on(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return which tile of which tensor each program takes, when tensor i has counts[i] tiles.

    int32 [sum of counts, 2]: tensor, tile. Kept, as shapes seldom change from call to call; the
    copy is waited for, so that every stream may read it.
    """
    sizes = torch.tensor(counts, dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), sizes)
    tile = torch.arange(len(tensor), device="cpu") - (sizes.cumsum(0) - sizes)[tensor]
    return torch.stack([tensor, tile], dim=1).to(torch.int32).to(device)


def all_registers(device: torch.device) -> dict[str, int]:
    """Options of a launch whose kernel may take every register of a thread, on NVIDIA.

    ptxas otherwise aims at more threads on a multiprocessor, and spills a few bytes for them.
    """
    return {"maxnreg": 255} if gpu_of(device).backend == "cuda" else {}


@functools.cache
def codebook_on(device: torch.device) -> torch.Tensor:
    """Return the 16 NF4 values on a device, fp32, made once."""
    return nf4_codebook(device)


@triton.jit
def nf4_select(code):
    """codebook[code] in fp32, exact, by a tree of selects: 15 of them, no memory, any target."""
    b3 = (code & 8) != 0
    b2 = (code & 4) != 0
    b1 = (code & 2) != 0
    b0 = (code & 1) != 0
    low = tl.where(b1, tl.where(b0, _V3, _V2), tl.where(b0, _V1, _V0))
    low = tl.where(b2, tl.where(b1, tl.where(b0, _V7, _V6), tl.where(b0, _V5, _V4)), low)
    high = tl.where(b1, tl.where(b0, _V11, _V10), tl.where(b0, _V9, _V8))
    high = tl.where(b2, tl.where(b1, tl.where(b0, _V15, _V14), tl.where(b0, _V13, _V12)), high)
    return tl.where(b3, high, low)


@triton.jit
def nf4_values(packed, codebook_ptr, LOOKUP: tl.constexpr):
    """The two exact fp32 codebook values of every byte: (even element, odd element).

    LOOKUP "table" reads the 64 bytes at codebook_ptr, one cache line, and is the faster; "select"
    takes no memory.
    """
    even = (packed >> 4).to(tl.int32)
    odd = (packed & 15).to(tl.int32)
    if LOOKUP == "table":
        return tl.load(codebook_ptr + even), tl.load(codebook_ptr + odd)
    else:
        return nf4_select(even), nf4_select(odd)


@triton.jit
def load_absmax(
    absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, block, mask,
    NESTED: tl.constexpr,
):  # fmt: skip
    """The fp32 absmax of blocks (int64 numbers), undoing double quantization: two roundings."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_absmax_ptr + block // _NESTED, mask=mask, other=0.0)
        return tl.load(nested_codebook_ptr + code) * scale + tl.load(nested_offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def philox_words(seed, row, index):
    """The four random words (uint32) of the counter `index + 2^64 row`; row and index int64.

    Word j of index 16 g + i belongs to column 64 g + 16 j + i: feinwerk.philox.element_words.
    """
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = (row & 0xFFFFFFFF).to(tl.uint32)
    c3 = (row >> 32).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def philox_word(seed, row, column):
    """The random word (uint32) of element (row, column), int64: four times philox_words' work."""
    w0, w1, w2, w3 = philox_words(seed, row, (column // 64) * 16 + column % 16)
    which = (column % 64) // 16
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
