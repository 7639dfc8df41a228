"""What is added to the product with W: scaling S B^T, dS A, the gain and the bias, in place.

```
   forward    y <- g (t - b) + b, or t where g is 1        t = y + scaling S B^T, y with its bias
              y <- t + (g - 1) (keep_scale z + scaling S B^T)   with dropout: z = masked x W~^T
   backward   u <- u + keep keep_scale (v + dS A)          v = ((g - 1) dY) W~, only with dropout
   fresh      y <- scaling S B^T + b,  u <- keep keep_scale (v + dS A)   before the product is added
```
g is exactly 1 where DoRA has just begun, and nothing is added without an adapter: y then keeps its
bits; where g is 0, y is the bias. What comes before the product is rounded to y's dtype once more,
and saves a pass over y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_products import (
    Tiles,
    gain_of,
    kept,
    precision_of,
    split_dot,
)  # fmt: skip
from feinwerk.philox import threshold
from feinwerk.triton_lib import Gpu, all_registers, gpu_of, launch


def _tiles(gpu: Gpu, dtype: torch.dtype, rank: int, stride: int) -> Tiles:
    if gpu.backend == "interpreter":
        return Tiles(128, 256, max(16, triton.next_power_of_2(min(rank, 256))), 4, 1)
    width = max(16, triton.next_power_of_2(min(rank, 32)))
    low = dtype is torch.bfloat16
    # Rows that begin anywhere take an address an element, for which a wide tile has no registers.
    wide = low and gpu.backend == "cuda" and gpu.arch != "80" and stride % 16 == 0
    return Tiles(64 if low else 32, 128 if wide else 64, width, 4, 1)


def expand(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    begin: int,
    end: int,
    scaling: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    first: int = 0,
    fresh: bool = False,
) -> None:
    """Add left[begin:end] right to out[begin:end] [*, n], as the module's drawing says.

    Args:
        out: [M, n], unit column stride; changed in place.
        left: fp32 [M, at least r], unit column stride.
        right: [r, n] of any strides and dtype.
        begin: first row.
        end: after the last row.
        scaling: fp32, one element, or None.
        magnitude: DoRA's [n], with norm: the forward's gain.
        norm: fp32 [n].
        bias: [n], what out holds beside the product with W.
        z: [M, n], unit column stride: the product with the masked x, or with (g - 1) dY.
        seed: of dropout, in the backward: masks what is added.
        dropout_p: dropout's probability.
        first: column of x where out begins, for the mask; a multiple of 64 if there is one.
        fresh: out holds nothing: it is filled with what is to be added to, the bias included.
    """
    (r, n), gpu = right.shape, gpu_of(out.device)
    tiles = _tiles(gpu, out.dtype, r, out.stride(0))
    launch(
        lora_linear_expand_fwd_kernel, (-(-(end - begin) // tiles.rows), -(-n // tiles.columns)),
        out, left, right, scaling, magnitude, norm, bias, z, seed,
        begin, end, n, r, out.stride(0), left.stride(0), right.stride(0), right.stride(1),
        0 if z is None else z.stride(0), first, 1 / (1 - dropout_p), threshold(dropout_p),
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank, DROPOUT=seed is not None,
        FRESH=fresh, SPLIT=out.dtype is torch.bfloat16, PRECISION=precision_of(out.device),
        num_warps=tiles.warps, **all_registers(out.device),
    )  # fmt: skip


def scale_columns(
    out: torch.Tensor,
    grad_y: torch.Tensor,
    *,
    begin: int,
    end: int,
    magnitude: torch.Tensor | None,
    norm: torch.Tensor | None,
    less: float,
) -> None:
    """Fill out[begin:end] with (g - less) dY, rounded once; g is 1 without a magnitude."""
    N = grad_y.shape[1]
    rows, columns = (128, 256) if gpu_of(out.device).backend == "interpreter" else (16, 256)
    launch(
        lora_linear_scale_columns_bwd_kernel, (-(-(end - begin) // rows), -(-N // columns)),
        out, grad_y, magnitude, norm, begin, end, N, less, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "threshold"])
def lora_linear_expand_fwd_kernel(
    out_ptr, left_ptr, right_ptr, scaling_ptr, magnitude_ptr, norm_ptr, bias_ptr, z_ptr, seed_ptr,
    begin, end, n, r, out_stride, left_stride, right_row, right_column, z_stride, first,
    keep_scale, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr,
    FRESH: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, in place: the ranks are summed in fp32 and the result is rounded once."""
    row = begin + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start.to(tl.int64) + tl.arange(0, COLUMNS)
    inside = column < n
    mask = (row < end)[:, None] & inside[None, :]
    delta = tl.zeros([ROWS, COLUMNS], tl.float32)
    for low in range(0, r, RANK):
        j = low + tl.arange(0, RANK)
        left = tl.load(
            left_ptr + row[:, None] * left_stride + j[None, :],
            mask=(row < end)[:, None] & (j < r)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + j[:, None].to(tl.int64) * right_row + column[None, :] * right_column,
            mask=(j < r)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        delta = split_dot(left, right, delta, SPLIT, PRECISION)
    if scaling_ptr is not None:
        delta = delta * tl.load(scaling_ptr)
    target = out_ptr + row[:, None] * out_stride + column[None, :]
    if FRESH:
        value = tl.zeros([ROWS, COLUMNS], tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            value += bias[None, :]
    else:
        value = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        if z_ptr is not None:
            z = tl.load(z_ptr + row[:, None] * z_stride + column[None, :], mask=mask, other=0.0)
            delta += z.to(tl.float32)
        keep = kept(seed_ptr, row, first + start, threshold, ROWS, COLUMNS)
        value += tl.where(keep, delta * keep_scale, 0.0)
    else:
        value += delta
        if norm_ptr is not None:
            gain = gain_of(magnitude_ptr, norm_ptr, column, inside)[None, :]
            if z_ptr is not None:
                z = tl.load(z_ptr + row[:, None] * z_stride + column[None, :], mask=mask, other=0.0)
                value += (gain - 1.0) * (z.to(tl.float32) * keep_scale + delta)
            else:
                bias = tl.zeros([COLUMNS], tl.float32)
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
                scaled = gain * (value - bias[None, :]) + bias[None, :]
                value = tl.where(gain == 1.0, value, scaled)
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["begin", "end"])
def lora_linear_scale_columns_bwd_kernel(
    out_ptr, grad_ptr, magnitude_ptr, norm_ptr, begin, end, N, less,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of (g - less) dY."""
    row = begin + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * N + n[None, :]
    mask = (row < end)[:, None] & (n < N)[None, :]
    gain = tl.full([COLUMNS], 1.0, tl.float32)
    if norm_ptr is not None:
        gain = gain_of(magnitude_ptr, norm_ptr, n, n < N)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * (gain - less)[None, :]
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_store(x_ptr, out_ptr, at, keep, mask):
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.where(keep, x, 0.0), mask=mask)


def masked(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Return x [M, K], contiguous, where dropout keeps it and 0 elsewhere; not divided by 1 - p."""
    out = torch.empty_like(x)
    M, K = x.shape
    rows, columns = (128, 512) if gpu_of(x.device).backend == "interpreter" else (16, 256)
    launch(
        lora_linear_mask_fwd_kernel, (-(-M // rows), -(-K // columns)),
        x, out, seed, M, K, threshold(dropout_p), ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_linear_mask_fwd_kernel(
    x_ptr, out_ptr, seed_ptr, M, K, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One tile of x under dropout's mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start.to(tl.int64) + tl.arange(0, COLUMNS)
    mask = (row < M)[:, None] & (column < K)[None, :]
    keep = kept(seed_ptr, row, start, threshold, ROWS, COLUMNS)
    _masked_store(x_ptr, out_ptr, row[:, None] * K + column[None, :], keep, mask)
