"""DoRA's inner product again, for the gradient of magnitude where y cannot say it.

```
   inner[m, n] = keep_scale masked(x)[m] . W~[n] + scaling S[m] . B[n]
   dm[n] = 1 / norm[n]  sum_m dY[m, n] inner[m, n]
```
A program multiplies its columns out for all rows of its part and keeps only their sums. Where y was
used, programs whose columns y served leave at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_base import Base
from feinwerk.ops.lora_linear.triton_products import parts_of_rows, precision_of, split_dot
from feinwerk.triton_lib import all_registers, codebook_on, gpu_of, launch, load_absmax, nf4_values

# Rows, columns, elements of K; and of the kernel that reads NF4 for a few columns.
_TILES = {torch.bfloat16: (128, 64, 64), torch.float16: (64, 64, 64), torch.float32: (64, 32, 32)}
_FEW = (64, 16, 32)


def magnitude_from_inner(
    grad: torch.Tensor,
    base: Base,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    norm: torch.Tensor,
    *,
    begin: int,
    end: int,
    keep_scale: float = 1.0,
    lost: torch.Tensor | None = None,
) -> None:
    """Fill grad [N] from rows begin to end; with `lost`, only where that is not 0.

    Args:
        grad: [N], contiguous.
        base: the weight. With `lost` NF4 codes are read as they are, else slab by slab.
        grad_y: [M, N], contiguous.
        x: [M, K], contiguous; masked where there is dropout.
        S: fp32 [M, at least r].
        lora_B: [N, r].
        scaling: fp32, one element.
        norm: fp32 [N].
        begin: first row.
        end: after the last row.
        keep_scale: dropout's 1 / (1 - p).
        lost: int32 [N], or None for all columns.
    """
    if lost is None:
        for first, last, slab in base.slabs():
            tables = (slab, None, None, None, None)
            _launch(
                grad, tables, grad_y, x, S, lora_B, scaling, norm, None, begin, end, first, last,
                keep_scale, base.blocksize,
            )  # fmt: skip
        return
    _launch(
        grad, base.tables, grad_y, x, S, lora_B, scaling, norm, lost, begin, end, 0, base.N,
        keep_scale, base.blocksize,
    )  # fmt: skip


def _launch(
    grad: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    grad_y: torch.Tensor,
    x: torch.Tensor,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    norm: torch.Tensor,
    lost: torch.Tensor | None,
    begin: int,
    end: int,
    first: int,
    last: int,
    keep_scale: float,
    blocksize: int,
) -> None:
    """Columns first to last, which are the rows of the weight in `tables`."""
    weight, absmax, nested_absmax, nested_codebook, nested_offset = tables
    assert weight is not None
    (N, K), r, gpu = (grad_y.shape[1], x.shape[1]), lora_B.shape[1], gpu_of(x.device)
    rows, columns, depth = _TILES[x.dtype] if lost is None else _FEW
    if gpu.arch == "80":
        rows, columns = rows // 2, max(16, columns // 2)  # both operands are in registers there
    if gpu.backend == "interpreter":
        rows, columns, depth = 64, 64, max(16, min(512, triton.next_power_of_2(K)))
    blocks = -(-(last - first) // columns)
    steps = -(-(end - begin) // rows)
    splits, part = parts_of_rows(gpu, steps, 1, 2 * gpu.multiprocessors // blocks)
    parts = torch.empty((splits, last - first), dtype=torch.float32, device=x.device)
    dense = absmax is None
    launch(
        lora_linear_inner_bwd_kernel, (blocks, splits),
        x, weight, absmax, nested_absmax, nested_codebook, nested_offset, codebook_on(x.device),
        grad_y, S, lora_B, scaling, lost, parts, begin, end, first, last, N, K, r,
        weight.stride(0) if dense else 0, weight.stride(1) if dense else 0, S.stride(0),
        lora_B.stride(0), lora_B.stride(1), part * rows, keep_scale,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, RANK=16,
        BLOCKSIZE=blocksize, DENSE=dense, NESTED=nested_absmax is not None,
        SPLIT=x.dtype is torch.bfloat16, PRECISION=precision_of(x.device),
        STAGES=1 if lost is not None else 2 if gpu.backend == "hip" else 3, num_warps=4,
        **all_registers(x.device),
    )  # fmt: skip
    block = 1024 if gpu.backend == "interpreter" else 128
    launch(
        lora_linear_inner_sum_bwd_kernel, (-(-(last - first) // block),),
        parts, norm, lost, grad, splits, first, last, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "first", "last"])
def lora_linear_inner_bwd_kernel(
    x_ptr, weight_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    codebook_ptr, grad_ptr, S_ptr, B_ptr, scaling_ptr, lost_ptr, parts_ptr,
    begin, end, first, last, N, K, r, weight_row, weight_column, S_stride, B_row, B_column, part,
    keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr, DENSE: tl.constexpr, NESTED: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the rows of COLUMNS columns: sum of dY inner."""
    local = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    n = first + local
    live = n < last
    if lost_ptr is not None:
        wanted = tl.load(lost_ptr + n, mask=live, other=0)
        if tl.max(wanted, axis=0) == 0:
            return
    split = tl.program_id(1).to(tl.int64)
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    total = tl.zeros([COLUMNS], tl.float32)
    for m in range(start, stop, ROWS):
        row = m + tl.arange(0, ROWS).to(tl.int64)
        inside = row < stop
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for low in range(0, r, RANK):
            j = low + tl.arange(0, RANK)
            S = tl.load(
                S_ptr + row[:, None] * S_stride + j[None, :],
                mask=inside[:, None] & (j < r)[None, :], other=0.0,
            )  # fmt: skip
            B = tl.load(
                B_ptr + n[None, :] * B_row + j[:, None].to(tl.int64) * B_column,
                mask=live[None, :] & (j < r)[:, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
            acc = split_dot(S, B, acc, SPLIT, PRECISION)
        # Divided by what the whole sum is multiplied with, so that there is one accumulator.
        acc = acc * (tl.load(scaling_ptr) / keep_scale)
        for k in tl.range(0, K, DEPTH, num_stages=STAGES):
            column = k + tl.arange(0, DEPTH).to(tl.int64)
            known = column < K
            x = tl.load(
                x_ptr + row[:, None] * K + column[None, :],
                mask=inside[:, None] & known[None, :], other=0.0,
            )  # fmt: skip
            mask = live[None, :] & known[:, None]
            if DENSE:
                W = tl.load(
                    weight_ptr + local[None, :] * weight_row + column[:, None] * weight_column,
                    mask=mask, other=0.0,
                ).to(x.dtype)  # fmt: skip
            else:
                at = (n[None, :] * K + column[:, None]).to(tl.uint64)
                codes = tl.load(weight_ptr + at // 2, mask=mask, other=0)
                even, odd = nf4_values(codes, codebook_ptr, "table")
                scale = load_absmax(
                    absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
                    at // BLOCKSIZE, mask, NESTED,
                )  # fmt: skip
                W = (tl.where(at % 2 == 0, even, odd) * scale).to(x.dtype)
                W = tl.where(mask, W, 0.0)
            acc = tl.dot(x, W, acc, input_precision=PRECISION)
        grad = tl.load(
            grad_ptr + row[:, None] * N + n[None, :], mask=inside[:, None] & live[None, :],
            other=0.0,
        )  # fmt: skip
        total += tl.sum(grad.to(tl.float32) * acc, axis=0) * keep_scale
    tl.store(parts_ptr + split * (last - first) + local, total, mask=live)


@triton.jit(do_not_specialize=["splits", "first", "last"])
def lora_linear_inner_sum_bwd_kernel(
    parts_ptr, norm_ptr, lost_ptr, grad_ptr, splits, first, last, BLOCK: tl.constexpr
):
    """The gradient of BLOCK magnitudes; those that are not lost stay as they are."""
    local = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = first + local
    mask = n < last
    if lost_ptr is not None:
        mask = mask & (tl.load(lost_ptr + n, mask=mask, other=0) != 0)
    total = tl.zeros([BLOCK], tl.float32)
    source = parts_ptr + local
    for _ in range(splits):
        total += tl.load(source, mask=mask, other=0.0)
        source += last - first
    norm = tl.load(norm_ptr + n, mask=mask, other=1.0)
    safe = tl.where(norm > 0, norm, 1.0)
    value = tl.where(norm > 0, tl.div_rn(total, safe), 0.0)
    tl.store(grad_ptr + n, value.to(grad_ptr.dtype.element_ty), mask=mask)
