"""blockwise_dequantize in Triton: pieces of blocks side by side, the scale loaded once a piece."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.triton_lib import gpu_of, launch


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
    rows = codes.shape[0] if layout == "rows" and codes.dim() > 1 else 1
    length = flat.numel() // rows
    size = min(blocksize, length)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    tile = 16384 if gpu_of(codes.device).backend == "interpreter" else 2048
    piece = min(triton.next_power_of_2(size), tile)
    per_row = -(-length // size)
    pieces = -(-size // piece)
    launch(
        blockwise_dequantize_fwd_kernel, (-(-rows * per_row * pieces // (tile // piece)),),
        out, flat, absmax, codebook, offset, length, size, per_row, pieces,
        rows * per_row * pieces,
        PIECES=tile // piece, PIECE=piece, GROUP=group_of(size, length, piece), num_warps=4,
    )  # fmt: skip
    return out


def group_of(size: int, length: int, piece: int) -> int:
    """Elements that a thread may take together: 4 where no block or row ends among them."""
    return 4 if size % 4 == 0 and length % 4 == 0 and piece >= 4 else 1


@triton.jit(do_not_specialize=["length", "size", "per_row", "pieces", "total"])
def blockwise_dequantize_fwd_kernel(
    out_ptr, codes_ptr, absmax_ptr, codebook_ptr, offset_ptr, length, size, per_row, pieces, total,
    PIECES: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Decode PIECES pieces, each PIECE elements of one block or less where the block ends."""
    number = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    block = number // pieces
    start = block % per_row * size + number % pieces * PIECE
    end = tl.minimum(block % per_row * size + size, length)
    rest = tl.where(number < total, tl.minimum(end - start, PIECE), 0).to(tl.int32)
    start = tl.multiple_of(block // per_row * length + start, GROUP)
    scale = tl.load(absmax_ptr + block, mask=number < total, other=0.0)
    group = tl.arange(0, PIECE // GROUP)[None, :, None] * GROUP
    inside = group < rest[:, None, None]
    at = start[:, None, None] + group + tl.arange(0, GROUP)[None, None, :]
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    value = tl.load(codebook_ptr + code) * scale[:, None, None]
    if offset_ptr is not None:
        value += tl.load(offset_ptr)
    tl.store(out_ptr + at, value, mask=inside)
