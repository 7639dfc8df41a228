"""blockwise_quantize in Triton: absmax of each block, then a binary search for every code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.blockwise_dequantize.triton import blocks_of, cut
from feinwerk.ops.blockwise_quantize.triton_mean import ordered_mean
from feinwerk.triton_lib import launch


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
    sizes = cut(x, blocksize, layout)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    blocks = sizes.rows * sizes.per_row
    shape = (rows, blocks // rows) if layout == "rows" else (blocks,)
    absmax = torch.empty(shape, dtype=torch.float32, device=x.device)
    offset = ordered_mean(flat) if center else torch.zeros((), device=x.device)
    launch(
        blockwise_quantize_fwd_kernel, (sizes.rows * sizes.programs_a_row,),
        codes, absmax, flat, codebook, offset if center else None,
        sizes.length, sizes.size, sizes.per_row,
        BLOCKS=sizes.blocks, PIECE=sizes.piece, GROUP=sizes.group,
        WHOLE=sizes.size <= sizes.piece, CPU_RULE=rule == "cpu", num_warps=8,
    )  # fmt: skip
    return codes, absmax, offset


@triton.jit(do_not_specialize=["length", "size", "per_row"])
def blockwise_quantize_fwd_kernel(
    codes_ptr, absmax_ptr, x_ptr, codebook_ptr, offset_ptr, length, size, per_row,
    BLOCKS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    CPU_RULE: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCKS blocks of a row, PIECE elements of each at a time: absmax, then codes."""
    start, count, block, live = blocks_of(tl.program_id(0), length, size, per_row, BLOCKS, GROUP)
    lane = tl.arange(0, PIECE // GROUP)[None, :, None] * GROUP
    at = lane + tl.arange(0, GROUP)[None, None, :]
    source = x_ptr + start + at
    target = codes_ptr + start + at
    if WHOLE:
        x = _centered(source, offset_ptr, lane < count)
        absmax = _absmax(x)
        code = _code(x, absmax, codebook_ptr, CPU_RULE)
        tl.store(target, code, mask=lane < count)
    else:
        absmax = tl.zeros([BLOCKS], tl.float32)
        for piece in range(0, size, PIECE):
            x = _centered(source + piece, offset_ptr, piece + lane < count)
            absmax = tl.maximum(absmax, _absmax(x))
        for piece in range(0, size, PIECE):
            x = _centered(source + piece, offset_ptr, piece + lane < count)
            code = _code(x, absmax, codebook_ptr, CPU_RULE)
            tl.store(target + piece, code, mask=piece + lane < count)
    tl.store(absmax_ptr + block, absmax, mask=live)


@triton.jit
def _centered(source, offset_ptr, inside):
    """Elements less the offset; 0, which no absmax notices, past the end."""
    x = tl.load(source, mask=inside, other=0.0)
    return x if offset_ptr is None else tl.where(inside, x - tl.load(offset_ptr), 0.0)


@triton.jit
def _absmax(x):
    """The greatest magnitude of each block, NaN left out."""
    return tl.max(tl.max(tl.where(x != x, 0.0, tl.abs(x)), 2), 1)


@triton.jit
def _code(x, absmax, codebook_ptr, CPU_RULE: tl.constexpr):
    absmax = absmax[:, None, None]
    scaled = x * tl.div_rn(1.0, absmax)
    nan = scaled != scaled
    if CPU_RULE:
        # The nearest of 65,536 bins, its number rounded by one fused multiply-add.
        half = (tl.clamp(scaled, -1.0, 1.0) + 1.0) * 0.5
        bin = tl.fma(half, tl.zeros_like(half) + 65535.0, tl.zeros_like(half) + 0.5)
        bin = tl.where(nan, 0.0, bin).to(tl.int32).to(tl.float32)
        code = _nearest(tl.div_rn(bin + bin, tl.zeros_like(bin) + 65535.0) - 1.0, codebook_ptr)
        code = tl.where(absmax == 0.0, 0, code)
    else:
        code = tl.where(nan, 0, _nearest(scaled, codebook_ptr))
    return code.to(tl.uint8)


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
