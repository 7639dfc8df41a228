"""blockwise_dequantize in Triton, and how both blockwise ops cut rows of blocks into programs.

```
   a row        | block 0        | block 1        | block 2        | 3    |    `length` elements
   a program    |<------ BLOCKS blocks of one row ------>|    PIECE of each at a time
```
Rows whose blocks are all whole, or that are one block each, are one long row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from feinwerk.triton_lib import gpu_of, launch


class Cut(NamedTuple):
    """The sizes of a launch."""

    rows: int
    length: int  # of a row
    size: int  # of a block
    per_row: int  # blocks
    blocks: int  # a program's
    piece: int  # elements of a block that a program takes at a time, a power of two
    group: int  # elements that a thread takes together: no block or row ends among them

    @property
    def programs_a_row(self) -> int:
        """Programs that share a row."""
        return -(-self.per_row // self.blocks)


def cut(x: torch.Tensor, blocksize: int, layout: str) -> Cut:
    """Cut x, which has at least one element, for this GPU."""
    rows = x.shape[0] if layout == "rows" and x.dim() > 1 else 1
    length = x.numel() // rows
    size = min(blocksize, length)
    if length % size == 0:
        rows, length = 1, x.numel()
    per_row = -(-length // size)
    group = 4 if size % 4 == 0 and length % 4 == 0 else 1
    tile = 256 * group
    if gpu_of(x.device).backend == "interpreter":
        tile = 16384
    piece = min(triton.next_power_of_2(size), tile)
    blocks = min(triton.next_power_of_2(per_row), tile // piece)
    return Cut(rows, length, size, per_row, blocks, piece, group)


def blockwise_dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
    layout: str = "flat",
) -> torch.Tensor:
    """Look every code up, multiply by its block's absmax, then add the offset: two roundings."""
    flat = codes.reshape(-1).contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    sizes = cut(codes, blocksize, layout)
    pieces = -(-sizes.size // sizes.piece)
    launch(
        blockwise_dequantize_fwd_kernel, (sizes.rows * sizes.programs_a_row * pieces,),
        out, flat, absmax, codebook, offset, sizes.length, sizes.size, sizes.per_row, pieces,
        BLOCKS=sizes.blocks, PIECE=sizes.piece, GROUP=sizes.group, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length", "size", "per_row", "pieces"])
def blockwise_dequantize_fwd_kernel(
    out_ptr, codes_ptr, absmax_ptr, codebook_ptr, offset_ptr, length, size, per_row, pieces,
    BLOCKS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Decode one piece of each of BLOCKS blocks of a row."""
    pid = tl.program_id(0)
    start, count, block, live = blocks_of(pid // pieces, length, size, per_row, BLOCKS, GROUP)
    scale = tl.load(absmax_ptr + block, mask=live, other=0.0)[:, None, None]
    group = pid % pieces * PIECE + tl.arange(0, PIECE // GROUP)[None, :, None] * GROUP
    inside = group < count
    at = group + tl.arange(0, GROUP)[None, None, :]
    code = tl.load(codes_ptr + start + at, mask=inside, other=0).to(tl.int32)
    value = tl.load(codebook_ptr + code) * scale
    if offset_ptr is not None:
        value += tl.load(offset_ptr)
    tl.store(out_ptr + start + at, value, mask=inside)


@triton.jit
def blocks_of(number, length, size, per_row, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """The blocks of a program: first element and count [BLOCKS, 1, 1], number, which exist."""
    programs = (per_row + BLOCKS - 1) // BLOCKS
    row = (number // programs).to(tl.int64)
    inner = number % programs * BLOCKS + tl.arange(0, BLOCKS)
    live = inner < per_row
    begin = inner.to(tl.int64) * size
    count = tl.where(live, tl.minimum(length - begin, size), 0).to(tl.int32)
    start = tl.multiple_of(row * length + begin, GROUP)
    return start[:, None, None], count[:, None, None], row * per_row + inner, live
