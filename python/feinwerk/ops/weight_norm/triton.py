"""weight_norm in Triton: one pass over W~, a slab of rows at a time, without B A.

```
   ||w + s b A||^2  =  base^2 + 2 s (w A^T) . b + s^2 (b A A^T) . b     w, b: rows of W~ and B
                                    cross, in parts of the length
```
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.ops.lora_linear.triton_base import Base
from feinwerk.ops.lora_linear.triton_products import (
    added_parts,
    parted_dot,
    parted_sum,
    parted_zeros,
    parts_of,
    parts_of_length,
    precision_of,
    tiles_of,
)  # fmt: skip
from feinwerk.ops.lora_linear.triton_shrink import shrink
from feinwerk.triton_lib import all_registers, gpu_of, launch


def weight_norm(
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    base_norm: torch.Tensor,
    *,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Fill the norms of the rows of W~ + scaling B A, slab by slab."""
    N, K = lora_B.shape[0], lora_A.shape[1]
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    scaling, base_norm = scaling.to(weight.device), base_norm.contiguous()
    norm = torch.empty((N,), dtype=torch.float32, device=weight.device)
    square = gram(lora_A)
    for begin, end, slab in Base(tables, N, K, blocksize, dtype).slabs():
        norm_of_rows(
            norm[begin:end], slab, lora_A, lora_B[begin:end], square, scaling, base_norm[begin:end]
        )
    return norm


def gram(lora_A: torch.Tensor) -> torch.Tensor:
    """A A^T, fp32 [r, r]."""
    r = lora_A.shape[0]
    A = lora_A.detach().float().contiguous()
    out = torch.empty((r, r), dtype=torch.float32, device=A.device)
    shrink(out, A, A, begin=0, end=r)
    return out


def norm_of_rows(
    norm: torch.Tensor,
    slab: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    square: torch.Tensor,
    scaling: torch.Tensor,
    base_norm: torch.Tensor,
) -> None:
    """Fill norm [n] for rows of W~: the slab [n, K] with unit column stride, their rows of B."""
    (n, K), r, gpu = slab.shape, lora_A.shape[0], gpu_of(slab.device)
    number = parts_of(slab.dtype, K, lora_A.dtype is slab.dtype)
    tiles = tiles_of(gpu, slab.dtype, r, K, number)
    blocks, ranks = -(-n // tiles.rows), -(-r // tiles.rank)
    splits, part = parts_of_length(gpu, tiles, K, max(1, blocks * ranks))
    cross = torch.empty((splits * ranks, n), dtype=torch.float32, device=slab.device)
    launch(
        weight_norm_cross_fwd_kernel, (blocks, splits, ranks),
        slab, lora_A, lora_B, cross, n, K, r, slab.stride(0), lora_A.stride(0), lora_A.stride(1),
        lora_B.stride(0), lora_B.stride(1), part,
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank, PARTS=number,
        PRECISION=precision_of(slab.device), STAGES=tiles.stages, num_warps=tiles.warps,
        **all_registers(slab.device),
    )  # fmt: skip
    rows, ahead = (256, 1) if gpu.backend == "interpreter" else (32, 16)
    launch(
        weight_norm_fwd_kernel, (-(-n // rows),),
        cross, lora_B, square, scaling, base_norm, norm, splits * ranks, n, r, lora_B.stride(0),
        lora_B.stride(1), ROWS=rows, RANK=16, AHEAD=ahead, PRECISION=precision_of(slab.device),
        num_warps=4,
    )  # fmt: skip


@triton.jit
def weight_norm_cross_fwd_kernel(
    slab_ptr, A_ptr, B_ptr, cross_ptr, n, K, r, slab_stride, A_row, A_column, B_row, B_column, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the length of ROWS rows: (W A^T) . B for RANK ranks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n
    split = tl.program_id(1).to(tl.int64)
    j = tl.program_id(2) * RANK + tl.arange(0, RANK)
    first = split * part
    last = tl.minimum(first + part, K)
    product = parted_zeros(ROWS, RANK, PARTS)
    for k in tl.range(first, last, COLUMNS, num_stages=STAGES):
        column = k + tl.arange(0, COLUMNS).to(tl.int64)
        inside = column < K
        W = tl.load(
            slab_ptr + row[:, None] * slab_stride + column[None, :],
            mask=live[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        A = tl.load(
            A_ptr + j[None, :].to(tl.int64) * A_row + column[:, None] * A_column,
            mask=inside[:, None] & (j < r)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        product = parted_dot(W, A, product, PARTS, PRECISION)
    B = tl.load(
        B_ptr + row[:, None] * B_row + j[None, :].to(tl.int64) * B_column,
        mask=live[:, None] & (j < r)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    cross = tl.sum(parted_sum(product, PARTS) * B, axis=1)
    target = tl.program_id(2) * tl.num_programs(1) + split
    tl.store(cross_ptr + target * n + row, cross, mask=live)


@triton.jit(do_not_specialize=["splits"])
def weight_norm_fwd_kernel(
    cross_ptr, B_ptr, square_ptr, scaling_ptr, base_ptr, norm_ptr, splits, n, r, B_row, B_column,
    ROWS: tl.constexpr, RANK: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the parts of cross in their order, and (B A A^T) . B, RANK ranks at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n
    cross = added_parts(cross_ptr + row, n, splits, live, AHEAD)
    whole = tl.zeros([ROWS], tl.float32)
    for low in range(0, r, RANK):
        j = low + tl.arange(0, RANK)
        image = tl.zeros([ROWS, RANK], tl.float32)
        for other in range(0, r, RANK):
            i = other + tl.arange(0, RANK)
            left = tl.load(
                B_ptr + row[:, None] * B_row + i[None, :].to(tl.int64) * B_column,
                mask=live[:, None] & (i < r)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            gram = tl.load(
                square_ptr + i[:, None] * r + j[None, :], mask=(i < r)[:, None] & (j < r)[None, :],
                other=0.0,
            )  # fmt: skip
            image = tl.dot(left, gram, image, input_precision=PRECISION)
        B = tl.load(
            B_ptr + row[:, None] * B_row + j[None, :].to(tl.int64) * B_column,
            mask=live[:, None] & (j < r)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        whole += tl.sum(image * B, axis=1)
    scaling = tl.load(scaling_ptr)
    change = 2.0 * scaling * cross + scaling * scaling * whole
    base = tl.load(base_ptr + row, mask=live, other=1.0)
    safe = tl.where(base > 0, base, 1.0)
    ratio = 1.0 + tl.div_rn(tl.div_rn(change, safe), safe)
    relative = base * tl.sqrt_rn(tl.maximum(ratio, 0.0, propagate_nan=tl.PropagateNan.ALL))
    alone = tl.sqrt_rn(tl.maximum(change, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(norm_ptr + row, tl.where(base > 0, relative, alone), mask=live)
