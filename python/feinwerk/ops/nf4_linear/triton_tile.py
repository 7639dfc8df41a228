"""nf4_linear and its gradient in one kernel each, exact W~, any sizes: a few to about 100 rows.

```
   forward    acc[BLOCK_N, BLOCK_M]  +=  W~even[BLOCK_N, HALF] @ x_even^T  +  W~odd @ x_odd^T
   gradient   even[BLOCK_M, HALF]  +=  grad[BLOCK_M, BLOCK_N] @ W~even[BLOCK_N, HALF], odd alike
```
HALF is half a step of K. Elements of even and odd k are operands of their own, so that nothing is
interleaved but the gradient's result. Where a row of W fills whole bytes, both come from one byte;
otherwise each finds its own. Parts of the summed dimension are added in order by a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.ops.nf4_dequantize.triton_planes import planes
from feinwerk.ops.nf4_linear.triton_decode import finish
from feinwerk.triton_lib import codebook_on, gpu_of, launch, load_absmax, nf4_values
from feinwerk.triton_tuning import TileChoice

_NESTED = tl.constexpr(NESTED_BLOCKSIZE)

Tables = tuple[torch.Tensor | None, ...]


def multiply_tile(
    x: torch.Tensor,
    tables: Tables,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    blocksize: int,
    choice: TileChoice,
) -> None:
    """Fill y [M, N], unit column stride, with x W~^T + bias for contiguous x [M, K]."""
    (M, K), N = x.shape, y.shape[1]
    if K % 2 == 0:
        # Both halves as rows of their own: the copy engine then feeds the tensor cores.
        split = torch.empty((2, M, K // 2), dtype=x.dtype, device=x.device)
        split.copy_(x.view(M, K // 2, 2).permute(2, 0, 1))
        x, odd_at, stride_m, stride_k = split, M * (K // 2), K // 2, 1
    else:
        odd_at, stride_m, stride_k = 1, K, 2
    block_m = _rows(M, choice)
    steps = -(-K // choice.block_k)
    tiles = (-(-N // choice.block_n), -(-M // block_m))
    splits, part = _parts(steps, tiles, choice, x.device)
    out = y if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    packed, absmax, nested_absmax, nested_codebook, nested_offset = tables
    launch(
        nf4_linear_tile_fwd_kernel, (*tiles, splits),
        x, packed, absmax, nested_absmax, nested_codebook, nested_offset, codebook_on(x.device),
        bias, out, M, N, K, odd_at, stride_m, out.stride(-2), part,
        BLOCKSIZE=blocksize, BLOCK_M=block_m, BLOCK_N=choice.block_n, BLOCK_K=choice.block_k,
        STRIDE_K=stride_k, EVEN=K % choice.block_k == 0, WHOLE=splits == 1,
        NESTED=nested_absmax is not None, LOOKUP=choice.lookup,
        ROW_SCALE=_row_scale(K, blocksize, choice), STAGES=choice.stages,
        num_warps=choice.warps,
    )  # fmt: skip
    if splits > 1:
        finish(out, bias, y)


def multiply_transposed_tile(
    grad: torch.Tensor,
    tables: Tables,
    grad_x: torch.Tensor,
    *,
    blocksize: int,
    choice: TileChoice,
) -> None:
    """Fill grad_x [M, K], unit column stride, with grad W~ for contiguous grad [M, N]."""
    (M, N), K = grad.shape, grad_x.shape[1]
    block_m = _rows(M, choice)
    steps = -(-N // choice.block_n)
    tiles = (-(-K // choice.block_k), -(-M // block_m))
    splits, part = _parts(steps, tiles, choice, grad.device)
    out = (
        grad_x
        if splits == 1
        else torch.empty((splits, M, K), dtype=torch.float32, device=grad.device)
    )
    packed, absmax, nested_absmax, nested_codebook, nested_offset = tables
    launch(
        nf4_linear_tile_bwd_kernel, (*tiles, splits),
        grad, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        codebook_on(grad.device), out, M, N, K, out.stride(-2), part,
        BLOCKSIZE=blocksize, BLOCK_M=block_m, BLOCK_N=choice.block_n, BLOCK_K=choice.block_k,
        BYTES=K % 2 == 0, EVEN=K % choice.block_k == 0, WHOLE=splits == 1,
        NESTED=nested_absmax is not None, LOOKUP=choice.lookup,
        ROW_SCALE=_row_scale(K, blocksize, choice), STAGES=choice.stages,
        num_warps=choice.warps,
    )  # fmt: skip
    if splits > 1:
        finish(out, None, grad_x)


def _gather_assembly() -> str:
    """PTX: $8 four bytes of codes, $9 the codebook; $0..$3 their even values, $4..$7 the odd.

    The codebook begins at a multiple of 64 bytes, as every allocation on a GPU does: an offset is
    set into its address, in one instruction, instead of added to 64 bits.
    """
    insert = 0xEA  # (offset & mask) | address
    lines = [".reg .b32 o, low, high;", ".reg .b64 a;", "mov.b64 {low, high}, $9;"]
    for nibble in range(8):
        to = nibble // 2 + (4 if nibble % 2 == 0 else 0)  # the low nibble is the odd element
        shift = 4 * nibble - 2  # a value has four bytes
        lines += [
            f"shr.u32 o, $8, {shift};" if shift > 0 else "shl.b32 o, $8, 2;",
            f"lop3.b32 o, o, 0x3c, low, {insert:#x};",
            "mov.b64 a, {o, high};",
            f"ld.global.nc.b32 ${to}, [a];",
        ]
    return "{ " + " ".join(lines) + " }"


_GATHER = tl.constexpr(_gather_assembly())


@triton.jit
def _values(packed, codebook_ptr, LOOKUP: tl.constexpr):
    """nf4_values, and two ways in PTX: "planes", and "gather", loads that are not made copies.

    The compiler would turn the loads of "table" into asynchronous copies, four bytes each.
    """
    if LOOKUP == "planes":
        return planes(packed)
    elif LOOKUP == "gather":
        return tl.inline_asm_elementwise(
            _GATHER, "=r,=r,=r,=r,=r,=r,=r,=r,r,l,l,l,l", [packed, codebook_ptr.to(tl.int64)],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return nf4_values(packed, codebook_ptr, LOOKUP)


def fits(K: int, blocksize: int, choice: TileChoice) -> bool:
    """Whether every step of every row fills whole bytes of one block: what a choice is made for."""
    return K % 2 == 0 and _row_scale(K, blocksize, choice)


def _rows(M: int, choice: TileChoice) -> int:
    return min(choice.block_m, max(16, triton.next_power_of_2(M)))


def _row_scale(K: int, blocksize: int, choice: TileChoice) -> bool:
    """Whether the step of a row lies in one block, whatever the row."""
    return blocksize % choice.block_k == 0 and K % choice.block_k == 0


def _parts(
    steps: int, tiles: tuple[int, int], choice: TileChoice, device: torch.device
) -> tuple[int, int]:
    """Into how many parts the steps are cut, and how many steps a part has."""
    wanted = choice.programs * gpu_of(device).multiprocessors // (tiles[0] * tiles[1])
    part = -(-steps // (choice.splits or max(1, min(steps // choice.least_steps, wanted))))
    return -(-steps // part), part


@triton.jit
def _scales(
    absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, row, k, element, mask,
    K, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """The absmax of the elements, one a row where a step lies in one block."""
    if ROW_SCALE:
        first = (row * K + k) // BLOCKSIZE
        every = row >= 0
        return load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, first, every,
            NESTED,
        )[:, None]  # fmt: skip
    else:
        return load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
            element // BLOCKSIZE, mask, NESTED,
        )  # fmt: skip


@triton.jit
def _weights(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    codebook_ptr, row, k, half, K, code, dtype: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BYTES: tl.constexpr, EVEN: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    ROW_SCALE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """W~ of rows at the even and odd elements of a step that begins at k: two [rows, HALF].

    code is the step's absmax code, one a row, if AHEAD.
    """
    column = k + 2 * half
    element = row[:, None] * K + column[None, :]
    if BYTES:
        mask = (row >= 0)[:, None] & (column < K)[None, :]
        source = packed_ptr + row[:, None] * (K // 2) + (k // 2 + half)[None, :]
        # A mask along K would keep the loads from being vectors.
        byte = tl.load(source) if EVEN else tl.load(source, mask=mask, other=0)
        even, odd = _values(byte, codebook_ptr, LOOKUP)
        if AHEAD:
            # load_absmax, whose code was fetched a step ago: what follows never waits for DRAM.
            scale = tl.load(nested_codebook_ptr + code.to(tl.int32))
            within = (row * K + k) // BLOCKSIZE // _NESTED
            scale = scale * tl.load(nested_absmax_ptr + within) + tl.load(nested_offset_ptr)
            scale = scale[:, None]
        else:
            scale = _scales(
                absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr, row, k,
                element, mask, K, BLOCKSIZE, NESTED, ROW_SCALE,
            )  # fmt: skip
        return (even * scale).to(dtype), (odd * scale).to(dtype)
    else:
        even = _element(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
            codebook_ptr, element, (row >= 0)[:, None] & (column < K)[None, :], BLOCKSIZE, NESTED,
            LOOKUP,
        )  # fmt: skip
        odd = _element(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
            codebook_ptr, element + 1, (row >= 0)[:, None] & (column + 1 < K)[None, :], BLOCKSIZE,
            NESTED, LOOKUP,
        )  # fmt: skip
        return even.to(dtype), odd.to(dtype)


@triton.jit
def _element(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    codebook_ptr, element, mask, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    LOOKUP: tl.constexpr,
):  # fmt: skip
    """W~ in fp32 of elements that may lie in either half of their byte."""
    byte = tl.load(packed_ptr + element // 2, mask=mask, other=0)
    even, odd = nf4_values(byte, codebook_ptr, LOOKUP)
    scale = load_absmax(
        absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
        element // BLOCKSIZE, mask, NESTED,
    )  # fmt: skip
    return tl.where(element % 2 == 0, even, odd) * scale


@triton.jit(do_not_specialize=["M", "part"])
def nf4_linear_tile_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    codebook_ptr, bias_ptr, out_ptr, M, N, K, odd_at, stride_m, out_stride, part,
    BLOCKSIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STRIDE_K: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, NESTED: tl.constexpr,
    LOOKUP: tl.constexpr, ROW_SCALE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_N rows of W, `part` steps of K, with BLOCK_M rows of x."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, BLOCK_K // 2)
    row = tl.minimum(n, N - 1).to(tl.int64)  # rows past the end repeat the last one
    live_m = (m < M)[None, :]
    x_row = x_ptr + m.to(tl.int64)[None, :] * stride_m
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = split * part * BLOCK_K
    last = tl.minimum(first + part * BLOCK_K, K)
    AHEAD: tl.constexpr = NESTED and ROW_SCALE and STRIDE_K == 1
    code = row
    if AHEAD:
        code = tl.load(absmax_ptr + (row * K + first) // BLOCKSIZE)
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        even, odd = _weights(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
            codebook_ptr, row, k, half, K, code, dtype, BLOCKSIZE, STRIDE_K == 1, EVEN, NESTED,
            LOOKUP, ROW_SCALE, AHEAD,
        )  # fmt: skip
        if AHEAD:
            following = tl.minimum(k + BLOCK_K, K - BLOCK_K)
            code = tl.load(absmax_ptr + (row * K + following) // BLOCKSIZE)
        at = (k // 2 + half)[:, None] * STRIDE_K
        if EVEN:
            x_even = tl.load(x_row + at, mask=live_m, other=0.0)
            x_odd = tl.load(x_row + odd_at + at, mask=live_m, other=0.0)
        else:
            column = (k + 2 * half)[:, None]
            x_even = tl.load(x_row + at, mask=live_m & (column < K), other=0.0)
            x_odd = tl.load(x_row + odd_at + at, mask=live_m & (column + 1 < K), other=0.0)
        acc = tl.dot(even, x_even, acc, input_precision="ieee")
        acc = tl.dot(odd, x_odd, acc, input_precision="ieee")
    if WHOLE and bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = (split.to(tl.int64) * M + m)[None, :] * out_stride + n[:, None]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & live_m)


@triton.jit(do_not_specialize=["M", "part"])
def nf4_linear_tile_bwd_kernel(
    grad_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    codebook_ptr, out_ptr, M, N, K, out_stride, part,
    BLOCKSIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, NESTED: tl.constexpr,
    LOOKUP: tl.constexpr, ROW_SCALE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_M rows of grad, `part` steps of N, with BLOCK_K columns of W."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    split = tl.program_id(2)
    k = tl.program_id(0) * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, BLOCK_K // 2)
    rows = tl.arange(0, BLOCK_N)
    live_m = (m < M)[:, None]
    grad_row = grad_ptr + m.to(tl.int64)[:, None] * N
    acc_even = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
    first = split * part * BLOCK_N
    last = tl.minimum(first + part * BLOCK_N, N)
    for begin in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = begin + rows
        row = tl.minimum(n, N - 1).to(tl.int64)
        even, odd = _weights(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
            codebook_ptr, row, k, half, K, row, dtype, BLOCKSIZE, BYTES, EVEN, NESTED, LOOKUP,
            ROW_SCALE, False,
        )  # fmt: skip
        grad = tl.load(grad_row + n[None, :], mask=live_m & (n < N)[None, :], other=0.0)
        acc_even = tl.dot(grad, even, acc_even, input_precision="ieee")
        acc_odd = tl.dot(grad, odd, acc_odd, input_precision="ieee")
    acc = tl.interleave(acc_even, acc_odd)
    column = k + tl.arange(0, BLOCK_K)
    to = (split.to(tl.int64) * M + m)[:, None] * out_stride + column[None, :]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=live_m & (column < K)[None, :])
