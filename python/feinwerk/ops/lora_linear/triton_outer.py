"""Sums over the rows of x or dY: dA = dS^T dropout(x), dB = scaling g (dY^T S), db, dm.

```
   a program: `columns` columns of x, some ranks, a part of the rows, from the first to the last
   parts[split, j, c] = sum_m left[m, j] f(x[m, c])             added in order by add_parts
```
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_products import (
    Tiles,
    gain_of,
    kept,
    parted_dot,
    parted_sum,
    parted_zeros,
    parts_of,
    parts_of_rows,
    precision_of,
)  # fmt: skip
from feinwerk.ops.lora_linear.triton_shrink import add_parts
from feinwerk.philox import threshold
from feinwerk.triton_lib import Gpu, all_registers, gpu_of, launch

# A gain below the first says too little of what it multiplied; so does y beside a bias of more
# than the second times the root mean square of y - bias.
_LEAST_GAIN = tl.constexpr(2.0**-10)
_MOST_BIAS = {torch.float32: 1024.0, torch.bfloat16: 4.0, torch.float16: 4.0}


def _tiles(gpu: Gpu, dtype: torch.dtype, rank: int) -> Tiles:
    if gpu.backend == "interpreter":
        return Tiles(256, 256, max(16, triton.next_power_of_2(min(rank, 256))), 4, 1)
    low = dtype is torch.bfloat16
    # mma of sm_80 holds both operands in registers.
    width = max(16, triton.next_power_of_2(min(rank, 32 if gpu.arch == "80" else 64)))
    columns = 128 if low and width <= 32 and gpu.arch != "80" else 64
    return Tiles(64 if low else 32, columns, width, 4, 3)


def _parts(gpu: Gpu, tiles: Tiles, programs: int, rows: int) -> tuple[int, int]:
    """Into how many parts the rows are split, and the rows of each."""
    wanted = 2 * gpu.multiprocessors // max(1, programs)
    splits, part = parts_of_rows(gpu, -(-rows // tiles.rows), 4, wanted)
    return splits, part * tiles.rows


def outer(
    out: torch.Tensor,
    left: torch.Tensor,
    x: torch.Tensor,
    *,
    begin: int,
    end: int,
    depth: int,
    scaling: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Fill out [r, length], any strides, with left[begin:end, :r]^T x[begin:end], x dropped out.

    Times scaling, and times magnitude / norm, a factor of each column; depth as in `shrink`.
    """
    (r, length), gpu = out.shape, gpu_of(x.device)
    tiles = _tiles(gpu, x.dtype, r)
    blocks, ranks = -(-length // tiles.columns), -(-r // tiles.rank)
    splits, part = _parts(gpu, tiles, blocks * ranks, end - begin)
    parts = torch.empty((splits, r, length), dtype=torch.float32, device=x.device)
    launch(
        lora_linear_outer_bwd_kernel, (blocks, ranks, splits),
        x, left, seed, parts, begin, end, length, r, x.stride(0), left.stride(0), part,
        1 / (1 - dropout_p) if seed is not None else 1.0, threshold(dropout_p),
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank, DROPOUT=seed is not None,
        PARTS=parts_of(x.dtype, depth), PRECISION=precision_of(x.device), STAGES=tiles.stages,
        num_warps=tiles.warps, **all_registers(x.device),
    )  # fmt: skip
    add_parts(out, parts, scaling=scaling, magnitude=magnitude, norm=norm)


def column_sums(grad_y: torch.Tensor) -> torch.Tensor:
    """The fp32 sums of the columns of dY [M, N]: the gradient of a bias."""
    total = torch.empty((grad_y.shape[1],), dtype=torch.float32, device=grad_y.device)
    parts = _sums(grad_y, 1, begin=0, end=len(grad_y))
    add_parts(total[None, :], parts)
    return total


def sums_over_y(
    grad_y: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, *, begin: int, end: int
) -> torch.Tensor:
    """Parts [splits, 2, N] of the sums of dY (y - b) and (y - b)^2 over rows begin to end."""
    return _sums(grad_y, 2, y=y, bias=bias, begin=begin, end=end)


def magnitude_of_sums(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 / m sum dY (y - b), and int32 [N]: not 0 where y says too little for that.

    Args:
        parts: fp32 [splits, 2, N], from `sums_over_y` or `read_grad_y`.
        bias: [N] or None.
        magnitude: [N].
        norm: fp32 [N].
        rows: that were summed.
        dtype: y's.
    """
    splits, _, N = parts.shape
    grad = torch.empty((N,), dtype=magnitude.dtype, device=magnitude.device)
    lost = torch.empty((N,), dtype=torch.int32, device=magnitude.device)
    most = _MOST_BIAS[dtype]
    block = 1024 if gpu_of(grad.device).backend == "interpreter" else 128
    launch(
        lora_linear_magnitude_bwd_kernel, (-(-N // block),),
        parts, bias, magnitude, norm, grad, lost, N, splits, rows, most * most,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad, lost


def _sums(
    grad_y: torch.Tensor,
    kinds: int,
    *,
    begin: int,
    end: int,
    y: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Parts [splits, kinds, N] of: sum dY without y, else sum dY (y - b) and sum (y - b)^2."""
    N, gpu = grad_y.shape[1], gpu_of(grad_y.device)
    tiles = _tiles(gpu, grad_y.dtype, 16)
    blocks = -(-N // tiles.columns)
    splits, part = _parts(gpu, tiles, blocks, end - begin)
    parts = torch.empty((splits, kinds, N), dtype=torch.float32, device=grad_y.device)
    launch(
        lora_linear_sums_bwd_kernel, (blocks, splits),
        grad_y, y, bias, parts, begin, end, N, part, ROWS=tiles.rows, COLUMNS=tiles.columns,
        KINDS=kinds, num_warps=tiles.warps,
    )  # fmt: skip
    return parts


@triton.jit(do_not_specialize=["begin", "end", "threshold"])
def lora_linear_outer_bwd_kernel(
    x_ptr, left_ptr, seed_ptr, parts_ptr, begin, end, length, r, x_stride, left_stride, part,
    keep_scale, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the rows of COLUMNS columns, against RANK columns of left."""
    first = tl.program_id(0) * COLUMNS
    column = first.to(tl.int64) + tl.arange(0, COLUMNS)
    j = tl.program_id(1) * RANK + tl.arange(0, RANK)
    split = tl.program_id(2).to(tl.int64)
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    acc = parted_zeros(COLUMNS, RANK, PARTS)
    for m in tl.range(start, stop, ROWS, num_stages=STAGES):
        row = m + tl.arange(0, ROWS).to(tl.int64)
        inside = row < end
        x = tl.load(
            x_ptr + row[:, None] * x_stride + column[None, :],
            mask=inside[:, None] & (column < length)[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            x = tl.where(kept(seed_ptr, row, first, threshold, ROWS, COLUMNS), x, 0.0)
        left = tl.load(
            left_ptr + row[:, None] * left_stride + j[None, :],
            mask=inside[:, None] & (j < r)[None, :], other=0.0,
        )  # fmt: skip
        acc = parted_dot(tl.trans(x), left, acc, PARTS, PRECISION)
    acc = parted_sum(acc, PARTS)
    if DROPOUT:
        acc = acc * keep_scale
    target = parts_ptr + (split * r + j[None, :]) * length + column[:, None]
    tl.store(target, acc, mask=(column < length)[:, None] & (j < r)[None, :])


@triton.jit(do_not_specialize=["begin", "end"])
def lora_linear_sums_bwd_kernel(
    grad_ptr, y_ptr, bias_ptr, parts_ptr, begin, end, N, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """One part of the rows of COLUMNS columns, added in the order of the rows."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    live = n < N
    split = tl.program_id(1).to(tl.int64)
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    total = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    bias = tl.zeros([COLUMNS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    for m in range(start, stop, ROWS):
        row = m + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < stop)[:, None] & live[None, :]
        at = row[:, None] * N + n[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is None:
            total += tl.sum(grad, axis=0)
        else:
            inner = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            inner = tl.where(mask, inner - bias[None, :], 0.0)
            total += tl.sum(grad * inner, axis=0)
            squares += tl.sum(inner * inner, axis=0)
    target = parts_ptr + split * KINDS * N + n
    tl.store(target, total, mask=live)
    if KINDS > 1:
        tl.store(target + N, squares, mask=live)


@triton.jit(do_not_specialize=["splits", "rows"])
def lora_linear_magnitude_bwd_kernel(
    parts_ptr, bias_ptr, magnitude_ptr, norm_ptr, grad_ptr, lost_ptr, N, splits, rows, most,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK magnitudes from the sums over y, and where they say too little."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    source = parts_ptr + n
    for _ in range(splits):
        total += tl.load(source, mask=live, other=0.0)
        squares += tl.load(source + N, mask=live, other=0.0)
        source += 2 * N
    magnitude = tl.load(magnitude_ptr + n, mask=live, other=1.0).to(tl.float32)
    lost = ~(tl.abs(gain_of(magnitude_ptr, norm_ptr, n, live)) >= _LEAST_GAIN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
        lost = lost | (bias * bias * rows.to(tl.float32) > most * squares)
    grad = tl.where(lost, 0.0, tl.div_rn(total, tl.where(lost, 1.0, magnitude)))
    tl.store(grad_ptr + n, grad.to(grad_ptr.dtype.element_ty), mask=live)
    tl.store(lost_ptr + n, lost.to(tl.int32), mask=live)
