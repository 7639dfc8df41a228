"""Long rows times a few vectors: S = dropout(x) A^T, dS = scaling dY (g B), A A^T.

```
   a program: `rows` rows of x, `rank` vectors, a part of the length       x is read once
   out[m, j] = scale * sum_k f(x[m, k]) g[k] right[j, k]
```
With few rows the length is split; a second kernel adds the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_products import (
    added_parts,
    gain_of,
    kept,
    parted_dot,
    parted_sum,
    parted_zeros,
    parts_of,
    parts_of_length,
    precision_of,
    tiles_of,
)  # fmt: skip
from feinwerk.philox import threshold
from feinwerk.triton_lib import all_registers, gpu_of, launch


def shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    right: torch.Tensor,
    *,
    begin: int,
    end: int,
    scaling: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    depth: int | None = None,
) -> None:
    """Fill out[begin:end, :r], fp32, with x[begin:end] right^T; right may have any strides.

    Args:
        out: fp32 [M, at least r], unit column stride.
        x: [M, length], unit column stride.
        right: [r, length].
        begin: first row.
        end: after the last row.
        scaling: fp32, one element: a factor.
        magnitude: with norm: right is multiplied by their quotient along the length.
        norm: fp32 [length].
        seed: of the dropout of x, or None.
        dropout_p: its probability.
        depth: additions on the way to what the result is for; sets how exact the parts are.
    """
    rows, length, r = end - begin, x.shape[1], right.shape[0]
    if rows == 0:
        return
    gpu = gpu_of(x.device)
    number = parts_of(x.dtype, depth or length, right.dtype is x.dtype and norm is None)
    tiles = tiles_of(gpu, x.dtype, r, length, number)
    if seed is not None and gpu.backend != "interpreter":
        tiles = tiles._replace(columns=64)  # drawing a mask takes registers
    blocks, ranks = -(-rows // tiles.rows), -(-r // tiles.rank)
    splits, part = parts_of_length(gpu, tiles, length, blocks * ranks)
    whole, target = splits == 1, out
    if not whole:
        target = torch.empty((splits, rows, r), dtype=torch.float32, device=x.device)
    launch(
        lora_linear_shrink_fwd_kernel, (blocks, ranks, splits),
        x, right, scaling if whole else None, magnitude, norm, seed, target,
        begin, rows, length, r, x.stride(0), right.stride(0), right.stride(1),
        target.stride(-2), part, begin if whole else 0, rows * r,
        1 / (1 - dropout_p) if seed is not None else 1.0, threshold(dropout_p),
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank,
        DROPOUT=seed is not None, PARTS=number,
        PRECISION=precision_of(x.device), STAGES=tiles.stages, num_warps=tiles.warps,
        **all_registers(x.device),
    )  # fmt: skip
    if not whole:
        add_parts(out[begin:end, :r], target, scaling=scaling)


def add_parts(
    out: torch.Tensor,
    parts: torch.Tensor,
    *,
    scaling: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> None:
    """Fill out [R, C], any strides and dtype, with the sum of parts [splits, R, C], in order.

    Times scaling, and times magnitude / norm, a factor of each column.
    """
    splits, rows, columns = parts.shape
    size, ahead = (16384, 1) if gpu_of(out.device).backend == "interpreter" else (256, 16)
    # A transposed result is written 16 of its contiguous elements at a time.
    width = 16 if out.stride(0) == 1 else min(256, max(16, triton.next_power_of_2(columns)))
    launch(
        lora_linear_add_parts_fwd_kernel, (-(-columns // width) * -(-rows // (size // width)),),
        out, parts, scaling, magnitude, norm, splits, rows, columns, out.stride(0), out.stride(1),
        ROWS=size // width, COLUMNS=width, AHEAD=ahead, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "rows", "first_out", "threshold"])
def lora_linear_shrink_fwd_kernel(
    x_ptr, right_ptr, scaling_ptr, magnitude_ptr, norm_ptr, seed_ptr, out_ptr,
    begin, rows, length, r, x_stride, right_row, right_column, out_stride, part, first_out,
    out_part, keep_scale, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the length of ROWS rows, against RANK vectors."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * RANK + tl.arange(0, RANK)
    split = tl.program_id(2).to(tl.int64)
    row = begin + m
    first = split * part
    last = tl.minimum(first + part, length)
    here = x_ptr + row[:, None] * x_stride
    vector = right_ptr + j[None, :].to(tl.int64) * right_row
    acc = parted_zeros(ROWS, RANK, PARTS)
    for k in tl.range(first, last, COLUMNS, num_stages=STAGES):
        column = k + tl.arange(0, COLUMNS).to(tl.int64)
        inside = column < length
        x = tl.load(here + column[None, :], mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(kept(seed_ptr, row, k, threshold, ROWS, COLUMNS), x, 0.0)
        right = tl.load(
            vector + column[:, None] * right_column, mask=inside[:, None] & (j < r)[None, :],
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        if norm_ptr is not None:
            right = right * gain_of(magnitude_ptr, norm_ptr, column, inside)[:, None]
        acc = parted_dot(x, right, acc, PARTS, PRECISION)
    acc = parted_sum(acc, PARTS)
    if DROPOUT:
        acc = acc * keep_scale
    if scaling_ptr is not None:
        acc = acc * tl.load(scaling_ptr)
    target = out_ptr + split * out_part + (first_out + m)[:, None] * out_stride + j[None, :]
    tl.store(target, acc, mask=(m < rows)[:, None] & (j < r)[None, :])


@triton.jit(do_not_specialize=["splits", "rows"])
def lora_linear_add_parts_fwd_kernel(
    out_ptr, parts_ptr, scaling_ptr, magnitude_ptr, norm_ptr, splits, rows, columns, out_row,
    out_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The sum of the parts of a tile, in their order, AHEAD loads at once, rounded once."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    source = parts_ptr + row * columns + column
    step = rows.to(tl.int64) * columns
    total = added_parts(source, step, splits, mask, AHEAD)
    if scaling_ptr is not None:
        total = total * tl.load(scaling_ptr)
    if norm_ptr is not None:
        total = total * gain_of(magnitude_ptr, norm_ptr, column, column < columns)
    tl.store(
        out_ptr + row * out_row + column * out_column, total.to(out_ptr.dtype.element_ty), mask=mask
    )
