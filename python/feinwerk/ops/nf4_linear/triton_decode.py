"""nf4_linear for few rows of x (decoding): the weight is read once, absmax applied after the dot.

```
   a tile of W: its lines are runs of 64 elements, 32 bytes,     n0 run 0 | n0 run 1 | n1 run 0 | ..
   RUNS neighbours of a row, then the next row's
   columns of x: the same runs of every row of x                 m0 run 0 | m0 run 1 | m1 run 0 | ..
   dots  =  even[TILE, 32] @ x[:, 0::2]^T  +  odd[TILE, 32] @ x[:, 1::2]^T
   acc  +=  absmax[:, None] * dots            at the end: y[n, m] = sum over run of [n run, m run]
```
A product of tensor cores has 8 columns, of which one row of x would fill one. Several runs share
them: what a run's line meets in another run's column is not used, costs nothing, and a warp reads
RUNS * 32 neighbouring bytes of a row, and RUNS neighbouring absmax, instead of one.

The high and the low nibbles are operands of their own, so that nothing is interleaved, and W is the
left operand, so that its codes become values in registers. x arrives in pairs of elements, as
32-bit words. Parts of K are summed in order by a second kernel, which adds the bias and rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.ops.nf4_linear import triton_prmt
from feinwerk.triton_lib import Gpu, gpu_of, launch, load_absmax, nf4_values
from feinwerk.triton_tuning import DecodeChoice

# absmax and 64 elements of a row: what the kernel takes at a time.
RUN = 64
_HALF = tl.constexpr(RUN // 2)
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)


def decode(
    x: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    blocksize: int,
    choice: DecodeChoice,
) -> None:
    """Fill y [M, N], unit column stride, with x W^T + bias for up to 16 contiguous rows of x.

    x is bf16 or fp16. K and the blocksize are multiples of 64.
    """
    M, K = x.shape
    N = y.shape[1]
    gpu = gpu_of(x.device)
    lookup = "prmt" if gpu.backend == "cuda" else "select"
    columns, runs = _columns(M, K, choice, gpu)
    rows = choice.tile // runs
    tiles = -(-N // rows)
    steps = K // (RUN * runs)
    splits = choice.splits or choice.programs * gpu.multiprocessors // tiles
    splits = max(1, min(splits, steps // choice.least_steps))
    whole = splits == 1
    out = y if whole else torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    packed, absmax, nested_absmax, nested_codebook, nested_offset = tables
    launch(
        nf4_linear_decode_fwd_kernel, (splits, tiles),
        pairs(x), packed, absmax, nested_absmax, nested_codebook, nested_offset, bias, out,
        M, N, K // 2, out.stride(-2),
        BLOCKSIZE=blocksize, TILE=choice.tile, COLUMNS=columns, RUNS=runs, WHOLE=whole,
        FP16=x.dtype is torch.float16, NESTED=nested_absmax is not None, LOOKUP=lookup,
        ASSEMBLY=triton_prmt.assembly(x.dtype) if lookup == "prmt" else "",
        DIVISOR=triton_prmt.SCALES[x.dtype] if lookup == "prmt" else 1.0,
        STAGES=choice.stages, num_warps=choice.warps,
    )  # fmt: skip
    if not whole:
        finish(out, bias, y)


def _columns(M: int, K: int, choice: DecodeChoice, gpu: Gpu) -> tuple[int, int]:
    """Return the columns of a product, NVIDIA's least are 8, and the runs that share them."""
    rows = 1 << (M - 1).bit_length()
    columns = max(rows, choice.columns, 16 if gpu.backend == "hip" else 8)
    runs = min(columns // rows, choice.runs)
    while K // RUN % runs:
        runs //= 2
    return columns, runs


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Return 16-bit x as words: an even element, the low half, and the odd one after it."""
    if x.storage_offset() % 8:
        x = x.clone()  # a word, and the 16 bytes of a vector load, want their alignment
    return x.view(torch.int32)


def finish(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Fill y with the sum of parts [splits, M, N], in order, and the bias, rounded once."""
    splits, M, N = parts.shape
    launch(
        nf4_linear_finish_fwd_kernel, (-(-N // 256), M),
        parts, bias, y, N, y.stride(0), splits, M * N, BLOCK=256, num_warps=2,
    )  # fmt: skip


@triton.jit
def _permuted(codes, ASSEMBLY: tl.constexpr, FP16: tl.constexpr):
    """The even and the odd elements of bytes, times c: see triton_prmt."""
    if FP16:
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def nf4_linear_decode_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    bias_ptr, out_ptr, M, N, row_bytes, out_stride,
    BLOCKSIZE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, RUNS: tl.constexpr,
    WHOLE: tl.constexpr, FP16: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    ASSEMBLY: tl.constexpr, DIVISOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply TILE / RUNS rows of W, a part of K, with all rows of x.

    row_bytes, K / 2, is an argument of its own: the compiler sees that it is a multiple of 16.
    """
    dtype: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    ROWS: tl.constexpr = TILE // RUNS
    XS: tl.constexpr = COLUMNS // RUNS
    STEP: tl.constexpr = RUNS * _HALF
    split = tl.program_id(0)
    n0 = tl.program_id(1) * ROWS
    line = tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    half = tl.arange(0, _HALF)
    row = tl.minimum(n0 + line // RUNS, N - 1).to(tl.int64)  # past the end: the last one again
    everywhere = row >= 0
    within = row * row_bytes + line % RUNS * _HALF  # of packed, and half the number of elements
    source = packed_ptr + within[:, None] + half[None, :]
    x_within = column // RUNS * row_bytes + column % RUNS * _HALF
    pair = x_ptr + x_within[None, :] + half[:, None]
    x_mask = (column // RUNS < M)[None, :]
    acc = tl.zeros([TILE, COLUMNS], tl.float32)
    # Parts of K take turns, so that programs that run together read neighbouring bytes.
    first = split * STEP
    stride = tl.num_programs(0) * STEP
    if NESTED:
        offset = tl.load(nested_offset_ptr)
        code = tl.load(absmax_ptr + (within + first) * 2 // BLOCKSIZE)
    for at in tl.range(first, row_bytes, stride, num_stages=STAGES):
        codes = tl.load(source + at)
        words = tl.load(pair + at, mask=x_mask, other=0)
        block = (within + at) * 2 // BLOCKSIZE
        if NESTED:
            # load_absmax, whose code was fetched a step ago: what follows never waits for DRAM.
            scale = tl.load(nested_codebook_ptr + code.to(tl.int32))
            scale = scale * tl.load(nested_absmax_ptr + block // _NESTED) + offset
            following = tl.where(at + stride < row_bytes, at + stride, at)
            code = tl.load(absmax_ptr + (within + following) * 2 // BLOCKSIZE)
        else:
            scale = load_absmax(
                absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, block,
                everywhere, NESTED,
            )  # fmt: skip
        if LOOKUP == "prmt":
            even, odd = _permuted(codes, ASSEMBLY, FP16)
        else:
            even, odd = nf4_values(codes, absmax_ptr, LOOKUP)
            even = even.to(dtype)
            odd = odd.to(dtype)
        x_even = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        x_odd = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        dots = tl.dot(even, x_even)
        dots = tl.dot(odd, x_odd, dots)
        acc = tl.fma(dots, tl.broadcast_to(scale[:, None], [TILE, COLUMNS]), acc)
    if RUNS > 1:
        acc = tl.where((line % RUNS)[:, None] == (column % RUNS)[None, :], acc, 0.0)
        acc = tl.sum(tl.reshape(acc, [ROWS, RUNS, XS, RUNS]), axis=3)
        acc = tl.sum(acc, axis=1)
    acc = acc * (1.0 / DIVISOR)
    n = n0 + tl.arange(0, ROWS)
    m = tl.arange(0, XS)
    if WHOLE and bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = (split * M + m).to(tl.int64)[None, :] * out_stride + n[:, None]
    live = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["splits"])
def nf4_linear_finish_fwd_kernel(
    parts_ptr, bias_ptr, y_ptr, N, y_stride, splits, size, BLOCK: tl.constexpr
):
    """Sum the parts of one row in order, add the bias, round once."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros([BLOCK], tl.float32)
    source = parts_ptr + m * N + n
    for _ in range(0, splits):
        total += tl.load(source, mask=mask, other=0.0)
        source += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * y_stride + n, total.to(y_ptr.dtype.element_ty), mask=mask)
