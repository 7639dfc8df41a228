"""nf4_dequantize in Triton: any tile of a weight; a thread turns a word of codes into 16 bytes.

```
   group g of a row      | byte 0  | byte 1  | byte 2  | byte 3  |    codes that a thread reads
                          e0   e1   e2   e3   e4   e5   e6   e7       weights that it writes
```
A group holds 16 bytes of output, 8 weights in bf16 and 4 in fp32. Consecutive threads hold
consecutive groups: loads and stores are coalesced, and nothing moves between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from feinwerk.ops.nf4_dequantize.triton_planes import planes
from feinwerk.triton_lib import Gpu, codebook_on, gpu_of, launch, load_absmax, nf4_values

LOOKUPS = ("table", "planes", "select")  # "planes" is PTX
_NARROWEST = 16  # groups of a tile's rows: one cache line of codes, two of bf16


class Choice(NamedTuple):
    """How a weight is cut and looked up: the one place that decides it."""

    lookup: str  # one of LOOKUPS
    groups: int  # a program's groups of 16 output bytes
    warps: int


def choose(gpu: Gpu) -> Choice:
    """Return the configuration for a GPU."""
    if gpu.backend == "interpreter":
        return Choice("table", 2048, 4)  # few programs: their number is what takes time there
    return Choice("table", 512, 4)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode the whole weight as one row."""
    out = torch.empty(list(shape), dtype=dtype, device=packed.device)
    flat = out.view(1, -1)
    dequantize_tile(
        flat, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        K=flat.shape[1], row=0, column=0, blocksize=blocksize,
    )  # fmt: skip
    return out


def dequantize_tile(
    out: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    K: int,
    row: int,
    column: int,
    blocksize: int,
    choice: Choice | None = None,
    keep: bool = False,
) -> None:
    """Fill out with W~[row : row + rows, column : column + columns] of a weight [*, K].

    Args:
        out: contiguous [rows, columns], fp32, bf16 or fp16.
        packed: uint8, the whole weight's codes in the flat layout.
        absmax: fp32 scales, or uint8 codes with the three nested tensors.
        nested_absmax: fp32 scales of the codes, or None.
        nested_codebook: fp32 [256], or None.
        nested_offset: fp32, 0-dim, or None.
        K: the length of the weight's rows.
        row: first row of the tile.
        column: first column of the tile.
        blocksize: elements per absmax.
        choice: another configuration than this GPU's own, for measurements.
        keep: out is read next, and should stay in the L2 cache until then.
    """
    _launch(
        out, None, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        K=K, N=0, first=row * K + column, blocksize=blocksize, choice=choice, keep=keep,
    )  # fmt: skip


def gather_rows(
    out: torch.Tensor,
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    blocksize: int,
) -> None:
    """Fill the contiguous out [rows, K] with the rows `indices` of a weight [N, K]."""
    _launch(
        out, indices, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        K=out.shape[1], N=N, first=0, blocksize=blocksize, choice=None, keep=False,
    )  # fmt: skip


def _launch(
    out: torch.Tensor,
    indices: torch.Tensor | None,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    *,
    K: int,
    N: int,
    first: int,
    blocksize: int,
    choice: Choice | None,
    keep: bool,
) -> None:
    rows, columns = out.shape
    if rows and columns == K and indices is None:
        rows, columns = 1, rows * columns
    choice = choice or choose(gpu_of(out.device))
    # A tile has no groups where one would begin inside a byte, or hold the end of a row and the
    # beginning of another: then a thread takes one weight at a time.
    group = 16 // out.element_size()
    strided = rows > 1 or indices is not None
    if first % group or (strided and (K % group or columns % group)):
        group = 1
    per_row = -(-columns // group)
    # A row in whole tiles, where it can be: others take masks.
    width = per_row & -per_row if strided else 0
    if width < _NARROWEST:
        width = triton.next_power_of_2(per_row)
    width = min(width, choice.groups)
    height = choice.groups // width if strided else 1
    pieces = -(-per_row // width)
    options = {"debug": True, "sanitize_overflow": False} if indices is not None else {}
    launch(
        nf4_dequantize_fwd_kernel, (pieces * -(-rows // height),),
        out, indices, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        codebook_on(out.device), first, K, N, rows, columns, pieces,
        BLOCK_BITS=blocksize.bit_length() - 1, GROUP=group, HEIGHT=height, WIDTH=width,
        ONE_ROW=not strided, GATHER=indices is not None, NESTED=nested_absmax is not None,
        LOOKUP=choice.lookup, KEEP="evict_last" if keep else "", num_warps=choice.warps, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "K", "N", "rows", "columns", "pieces"])
def nf4_dequantize_fwd_kernel(
    out_ptr, indices_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr,
    nested_offset_ptr, codebook_ptr, first, K, N, rows, columns, pieces,
    BLOCK_BITS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ONE_ROW: tl.constexpr, GATHER: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Decode HEIGHT rows of WIDTH groups; groups of one weight serve any alignment."""
    pid = tl.program_id(0)
    lane = tl.arange(0, HEIGHT * WIDTH)
    down = lane // WIDTH
    across = lane % WIDTH * GROUP
    if ONE_ROW:
        top = tl.zeros([], tl.int64)
        left = pid.to(tl.int64) * (WIDTH * GROUP)
    else:
        top = (pid // pieces).to(tl.int64) * HEIGHT
        left = (pid % pieces).to(tl.int64) * (WIDTH * GROUP)
    live = (top + down < rows) & (left + across < columns)
    target = out_ptr + tl.multiple_of(top * columns + left, GROUP) + across
    if HEIGHT > 1:
        target += down * tl.multiple_of(columns.to(tl.int64), GROUP)
    distance = across
    if GATHER:
        row = tl.load(indices_ptr + top + down, mask=top + down < rows, other=0).to(tl.int64)
        inside = (row >= 0) & (row < N)
        tl.device_assert(inside, "nf4_embedding: indices must be in [0, N)")
        start = tl.multiple_of(left, GROUP)
        distance += tl.where(inside, row, 0) * tl.multiple_of(K.to(tl.int64), GROUP)
    else:
        start = tl.multiple_of(first + top * K + left, GROUP)
        if HEIGHT > 1:
            distance += down * tl.multiple_of(K.to(tl.int64), GROUP)
    # start is split into whole blocks and bytes, so that within one row 32 bits suffice.
    within = (start & ((1 << BLOCK_BITS) - 1)).to(tl.int32) + distance
    block = (start >> BLOCK_BITS) + (within >> BLOCK_BITS)
    if GROUP == 1:
        scale = load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, block, live,
            NESTED,
        )  # fmt: skip
        byte = tl.load(packed_ptr + ((start + distance) >> 1), mask=live, other=0)
        even, odd = nf4_values(byte, codebook_ptr, "table")
        value = tl.where((start + distance) & 1 == 0, even, odd) * scale
        tl.store(target, value.to(out_ptr.dtype.element_ty), mask=live, eviction_policy=KEEP)
    else:
        source = packed_ptr + (start >> 1) + (distance >> 1)
        whole = (top + HEIGHT <= rows) & (left + WIDTH * GROUP <= columns)
        if whole:
            every = tl.full([HEIGHT * WIDTH], 1, tl.int1)
            scale = load_absmax(
                absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, block, every,
                NESTED,
            )  # fmt: skip
            bytes = tl.load(source[:, None] + tl.arange(0, GROUP // 2)[None, :])
            even, odd = _values(bytes, codebook_ptr, LOOKUP)
            value = tl.join(even * scale[:, None], odd * scale[:, None])
            value = tl.reshape(value, [HEIGHT * WIDTH, GROUP]).to(out_ptr.dtype.element_ty)
            tl.store(target[:, None] + tl.arange(0, GROUP)[None, :], value, eviction_policy=KEEP)
        else:
            scale = load_absmax(
                absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, block, live,
                NESTED,
            )  # fmt: skip
            rest = tl.where(live, columns - left - across, 0)[:, None]
            half = tl.arange(0, GROUP // 2)[None, :]
            bytes = tl.load(source[:, None] + half, mask=half * 2 < rest, other=0)
            even, odd = _values(bytes, codebook_ptr, LOOKUP)
            value = tl.join(even * scale[:, None], odd * scale[:, None])
            value = tl.reshape(value, [HEIGHT * WIDTH, GROUP]).to(out_ptr.dtype.element_ty)
            one = tl.arange(0, GROUP)[None, :]
            tl.store(target[:, None] + one, value, mask=one < rest, eviction_policy=KEEP)


@triton.jit
def _values(packed, codebook_ptr, LOOKUP: tl.constexpr):
    if LOOKUP == "planes":
        return planes(packed)
    else:
        return nf4_values(packed, codebook_ptr, LOOKUP)
