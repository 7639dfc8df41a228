"""blockwise_quantize in Triton: absmax of each block, then a binary search for every code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.blockwise_dequantize.triton import group_of
from feinwerk.ops.blockwise_quantize.triton_mean import ordered_mean
from feinwerk.triton_lib import gpu_of, launch


def blockwise_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subtract the mean if asked, scale each block by its absmax, take the nearest code."""
    flat = x.reshape(-1).contiguous()
    rows = x.shape[0] if layout == "rows" and x.dim() > 1 else 1
    length = flat.numel() // rows
    size = min(blocksize, length)
    per_row = -(-length // size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    shape = (rows, per_row) if layout == "rows" else (per_row,)
    absmax = torch.empty(shape, dtype=torch.float32, device=x.device)
    offset = ordered_mean(flat) if center else torch.zeros((), device=x.device)
    tile = 16384 if gpu_of(x.device).backend == "interpreter" else 2048
    piece = min(triton.next_power_of_2(size), tile)
    launch(
        blockwise_quantize_fwd_kernel, (-(-rows * per_row // (tile // piece)),),
        codes, absmax, flat, codebook, offset if center else None, length, size, per_row,
        rows * per_row,
        BLOCKS=tile // piece, PIECE=piece, GROUP=group_of(size, length, piece), CPU_RULE=rule == "cpu", num_warps=4,
    )  # fmt: skip
    return codes, absmax, offset


@triton.jit(do_not_specialize=["length", "size", "per_row", "total"])
def blockwise_quantize_fwd_kernel(
    codes_ptr, absmax_ptr, x_ptr, codebook_ptr, offset_ptr, length, size, per_row, total,
    BLOCKS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, CPU_RULE: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCKS blocks of `size` elements, PIECE at a time: first absmax, then codes."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inner = block % per_row * size
    count = tl.where(block < total, tl.minimum(length - inner, size), 0)[:, None, None]
    start = tl.multiple_of(block // per_row * length + inner, GROUP)[:, None, None]
    lane = tl.arange(0, PIECE // GROUP)[None, :, None] * GROUP
    offset = tl.load(offset_ptr) if offset_ptr is not None else 0.0
    absmax = tl.zeros([BLOCKS], tl.float32)
    for piece in range(0, size, PIECE):
        at = start + piece + lane + tl.arange(0, GROUP)[None, None, :]
        x = tl.load(x_ptr + at, mask=piece + lane < count, other=0.0)
        if offset_ptr is not None:
            x = tl.where(piece + lane < count, x - offset, 0.0)
        magnitude = tl.where(x != x, 0.0, tl.abs(x))
        absmax = tl.maximum(absmax, tl.max(tl.max(magnitude, 2), 1))
    tl.store(absmax_ptr + block, absmax, mask=block < total)
    inverse = tl.div_rn(1.0, absmax)[:, None, None]
    for piece in range(0, size, PIECE):
        at = start + piece + lane + tl.arange(0, GROUP)[None, None, :]
        x = tl.load(x_ptr + at, mask=piece + lane < count, other=0.0)
        if offset_ptr is not None:
            x = x - offset
        scaled = x * inverse
        nan = scaled != scaled
        if CPU_RULE:
            # The nearest of 65,536 bins, its number rounded by one fused multiply-add.
            half = (tl.clamp(scaled, -1.0, 1.0) + 1.0) * 0.5
            bin = tl.fma(half, tl.zeros_like(half) + 65535.0, tl.zeros_like(half) + 0.5)
            bin = tl.where(nan, 0.0, bin).to(tl.int32).to(tl.float32)
            scaled = tl.div_rn(bin + bin, tl.zeros_like(bin) + 65535.0) - 1.0
            code = _nearest(scaled, codebook_ptr)
            code = tl.where(absmax[:, None, None] == 0.0, 0, code)
        else:
            code = tl.where(nan, 0, _nearest(scaled, codebook_ptr))
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=piece + lane < count)


@triton.jit
def _nearest(value, codebook_ptr):
    """How many midpoints between neighbours of the codebook lie strictly below value.

    Of the entries strictly below, found by 8 steps, all but the last lie under such a midpoint;
    whether the last does is seen from the midpoint above it.
    """
    below = tl.zeros_like(value).to(tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        entry = tl.load(codebook_ptr + below + (step - 1))
        below += tl.where(entry < value, step, 0)
    last = tl.maximum(below - 1, 0)
    midpoint = (tl.load(codebook_ptr + last) + tl.load(codebook_ptr + below)) * 0.5
    return tl.where(below == 0, 0, last + (midpoint < value).to(tl.int32))
