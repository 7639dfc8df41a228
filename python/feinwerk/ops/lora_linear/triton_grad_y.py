"""One read of dY for all that it is needed for, with ranks of one tile.

```
   a program: `columns` columns of dY, a part of the rows, from the first to the last
   dS part of these columns   = dY (g B)          added over the columns by add_parts
   dB part of these rows     += dY^T S            added over the parts by add_parts
   DoRA: sums of dY (y - b) and (y - b)^2, and (g - less) dY rounded for the product with W
```
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_products import (
    Tiles,
    gain_of,
    parted_dot,
    parted_sum,
    parted_zeros,
    parts_of,
    parts_of_rows,
    precision_of,
)  # fmt: skip
from feinwerk.ops.lora_linear.triton_shrink import add_parts
from feinwerk.triton_lib import Gpu, all_registers, gpu_of, launch

# Parts of dS take rank * 4 bytes a row and block of columns: beyond this, reading dY again is less.
MOST_RANK = 32


def _tiles(gpu: Gpu, dtype: torch.dtype, rank: int, dora: bool, parts: int) -> Tiles:
    width = max(16, triton.next_power_of_2(rank))
    if gpu.backend == "interpreter":
        return Tiles(256, 256, width, 4, 1)
    if dtype is not torch.bfloat16:
        return Tiles(32, 64, width, 4, 2)
    if gpu.backend == "hip":
        return Tiles(32, 64, width, 4, 2)
    # What DoRA makes of dY, element by element, takes registers; so do parts of B.
    heavy, old = dora and parts > 2, gpu.arch == "80"
    columns = 64 if heavy and old else 256 if width == 16 and not heavy and not old else 128
    return Tiles(32 if dora else 64, columns, width, 8, 3)


def read_grad_y(
    grad_y: torch.Tensor,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    *,
    begin: int,
    end: int,
    depths: tuple[int, int],
    dS: torch.Tensor | None,
    grad_B: torch.Tensor | None,
    y: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    less: float = 0.0,
) -> torch.Tensor | None:
    """Fill what is given of dS[begin:end], grad_B and scaled[begin:end]; with y return its sums.

    Args:
        grad_y: [M, N], contiguous.
        S: fp32 [M, at least r], unit column stride.
        lora_B: [N, r], r at most MOST_RANK.
        scaling: fp32, one element.
        begin: first row.
        end: after the last row.
        depths: additions on the way to dx and dA, and to dB: how exact the parts are.
        dS: fp32 [M, at least r], or None.
        grad_B: [N, r], or None.
        y: [M, N], contiguous, for the sums that `magnitude_of_sums` takes.
        bias: [N], what y holds beside what the gain multiplies.
        magnitude: [N], with norm: DoRA's gain.
        norm: fp32 [N].
        scaled: [M, N], contiguous, for (g - less) dY.
        less: 1 with dropout, else 0.
    """
    (N, r), rows, gpu = lora_B.shape, end - begin, gpu_of(grad_y.device)
    B_parts = parts_of(grad_y.dtype, depths[0], norm is None and lora_B.dtype is grad_y.dtype)
    tiles = _tiles(gpu, grad_y.dtype, r, norm is not None, B_parts)
    blocks, steps = -(-N // tiles.columns), -(-rows // tiles.rows)
    splits, part = parts_of_rows(gpu, steps, 2, gpu.multiprocessors // blocks)
    make: dict[str, Any] = {"dtype": torch.float32, "device": grad_y.device}
    dS_parts = None if dS is None else torch.empty((blocks, rows, r), **make)
    dB_parts = None if grad_B is None else torch.empty((splits, r, N), **make)
    sums = None if y is None else torch.empty((splits, 2, N), **make)
    # Rows of a tile that the warps hold at once, with 16 bytes a thread.
    threads = tiles.warps * (64 if gpu.backend == "hip" else 32)
    kept = min(tiles.rows, 16 // grad_y.element_size() * threads // tiles.columns)
    launch(
        lora_linear_grad_y_bwd_kernel, (blocks, splits),
        grad_y, lora_B, S, y, bias, magnitude, norm, scaled, dS_parts, dB_parts, sums,
        begin, end, N, r, lora_B.stride(0), lora_B.stride(1), S.stride(0), part * tiles.rows, less,
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank,
        B_PARTS=B_parts, S_PARTS=parts_of(grad_y.dtype, depths[1]),
        PRECISION=precision_of(grad_y.device), STAGES=tiles.stages, KEPT=kept,
        num_warps=tiles.warps, **all_registers(grad_y.device),
    )  # fmt: skip
    if dS is not None and dS_parts is not None and rows:
        add_parts(dS[begin:end, :r], dS_parts, scaling=scaling)
    if grad_B is not None and dB_parts is not None:
        add_parts(grad_B.t(), dB_parts, scaling=scaling, magnitude=magnitude, norm=norm)
    return sums


@triton.jit
def _add_rows(total, tile):
    """Add the rows of a tile to fewer rows, which every thread does by itself."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1]
    return total + tl.sum(tl.reshape(tile, [tile.shape[0] // ROWS, ROWS, COLUMNS]), axis=0)


@triton.jit(do_not_specialize=["begin", "end", "less"])
def lora_linear_grad_y_bwd_kernel(
    grad_ptr, B_ptr, S_ptr, y_ptr, bias_ptr, magnitude_ptr, norm_ptr, scaled_ptr, dS_ptr, dB_ptr,
    sums_ptr, begin, end, N, r, B_row, B_column, S_stride, part, less,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, B_PARTS: tl.constexpr,
    S_PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one part of the rows; sums go over the rows in their order."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    live = n < N
    j = tl.arange(0, RANK)
    split = tl.program_id(1).to(tl.int64)
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    B = tl.load(
        B_ptr + n[:, None] * B_row + j[None, :].to(tl.int64) * B_column,
        mask=live[:, None] & (j < r)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    gain = tl.full([COLUMNS], 1.0, tl.float32)
    if norm_ptr is not None:
        gain = gain_of(magnitude_ptr, norm_ptr, n, live)
        B = B * gain[:, None]
    bias = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    dB = parted_zeros(COLUMNS, RANK, S_PARTS)
    total = tl.zeros([KEPT, COLUMNS], tl.float32)
    squares = tl.zeros([KEPT, COLUMNS], tl.float32)
    for m in tl.range(start, stop, ROWS, num_stages=STAGES):
        row = m + tl.arange(0, ROWS).to(tl.int64)
        inside = row < stop
        at = row[:, None] * N + n[None, :]
        mask = inside[:, None] & live[None, :]
        ranks = inside[:, None] & (j < r)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        if dS_ptr is not None:
            dS = parted_dot(grad, B, parted_zeros(ROWS, RANK, B_PARTS), B_PARTS, PRECISION)
            dS = parted_sum(dS, B_PARTS)
            target = tl.program_id(0) * (end - begin).to(tl.int64) + row - begin
            tl.store(dS_ptr + target[:, None] * r + j[None, :], dS, mask=ranks)
        if dB_ptr is not None:
            S = tl.load(S_ptr + row[:, None] * S_stride + j[None, :], mask=ranks, other=0.0)
            dB = parted_dot(tl.trans(grad), S, dB, S_PARTS, PRECISION)
        if y_ptr is not None:
            inner = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                inner = tl.where(mask, inner - bias[None, :], 0.0)
            total = _add_rows(total, grad.to(tl.float32) * inner)
            squares = _add_rows(squares, inner * inner)
        if scaled_ptr is not None:
            scaled = grad.to(tl.float32) * (gain - less)[None, :]
            tl.store(scaled_ptr + at, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)
    if dB_ptr is not None:
        target = dB_ptr + (split * r + j[None, :]) * N + n[:, None]
        tl.store(target, parted_sum(dB, S_PARTS), mask=live[:, None] & (j < r)[None, :])
    if y_ptr is not None:
        target = sums_ptr + split * 2 * N + n
        tl.store(target, tl.sum(total, axis=0), mask=live)
        tl.store(target + N, tl.sum(squares, axis=0), mask=live)
