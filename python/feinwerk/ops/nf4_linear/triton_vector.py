"""nf4_linear for one or two rows of x (decoding): a look-up a byte, sums in fp32 registers.

```
   a thread     four words of every row of its tile, 32 elements    its part of x in registers
   a byte       one look-up gives both values                       c times the codebook
   y[n, m]      sum over blocks of absmax times the block's dot     over lanes and warps at the end
```
The table has a word for every byte of codes. It lies in shared memory once for each of the 32
banks, 32 KiB in all, so that a warp's look-ups never collide: FLUTE's idea (arXiv 2407.10960). A
program fills it once and takes tiles of W in turn; the next tile's bytes are on their way while one
is multiplied. From sm_90 on it fills the table beside the end of the kernel before it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from feinwerk.codebook import NESTED_BLOCKSIZE, NF4_VALUES
from feinwerk.ops.nf4_linear import triton_prmt
from feinwerk.triton_lib import addresses, gpu_of, launch, nf4_select
from feinwerk.triton_tuning import VectorChoice

_NESTED = tl.constexpr(NESTED_BLOCKSIZE)
_PAIRS_BYTES = 256 * 32 * 4
# What a thread has of a row: 16 bytes. Rows and blocks are multiples of it.
WORDS = 4
_WORDS = tl.constexpr(WORDS)


def fill_assembly(early: bool) -> str:
    """PTX, run once by every thread: fill the table from the 256 words at $2.

    $0 the table's address, $1 the lane's offset in every byte. Entry e begins at 256 (e mod 128) +
    128 (e div 128): so the bytes of an address are the lane with the code's top bit, and its rest.
    `early` (sm_90): this may run beside the kernel before it, for whose end it waits at last.
    """
    lines = [
        "{",
        ".shared .align 16 .b32 nf4_pairs[8448];",
        ".reg .b32 threads, entry, value, row, chunk, at, table;",
        ".reg .b64 source;",
        ".reg .pred more;",
        *(["griddepcontrol.launch_dependents;"] if early else []),
        "mov.u32 table, nf4_pairs;",
        "mov.u32 entry, %tid.x;",
        "mov.u32 threads, %ntid.x;",
        "NEXT_${:uid}:",
        "setp.lt.u32 more, entry, 256;",
        "@!more bra DONE_${:uid};",
        "mad.wide.u32 source, entry, 4, $2;",
        "ld.global.nc.b32 value, [source];",
        "and.b32 row, entry, 127;",
        "shl.b32 row, row, 8;",
        "and.b32 at, entry, 128;",
        "add.u32 row, row, at;",
        "add.u32 row, row, table;",
    ]
    for i in range(8):
        # Lanes begin at different banks.
        lines += [
            f"add.u32 chunk, entry, {i};",
            "and.b32 chunk, chunk, 7;",
            "shl.b32 chunk, chunk, 4;",
            "add.u32 at, row, chunk;",
            "st.shared.v4.b32 [at], {value, value, value, value};",
        ]
    lines += [
        "add.u32 entry, entry, threads;",
        "bra NEXT_${:uid};",
        "DONE_${:uid}:",
        *(["griddepcontrol.wait;"] if early else []),
        "bar.sync 0;",
        "mov.u32 $0, table;",
        "mov.u32 at, %laneid;",
        "mul.lo.u32 $1, at, 0x04040404;",
        "}",
    ]
    return "\n".join(lines)


def values_assembly(fp16: bool) -> str:
    """PTX: $0..$7 the values of eight codes in order, $8 their word, $9 the lane, $10 the table.

    A word of bf16 is read as the odd one's fp32 as it stands: `pairs_on` makes up for it.
    """
    lines = [
        "{ .reg .b32 codes, side, at; .reg .b16 low, high;",
        "and.b32 codes, $8, 0x7f7f7f7f;",
        "lop3.b32 side, $8, 0x80808080, $9, 0xea;",  # (codes & mask) | lane
    ]
    for j in range(4):
        # The lane and the code's top bit; its seven others; twice a byte of zeros, their sign.
        select = (4 + j) | j << 4 | (8 + j) << 8 | (8 + j) << 12
        even, odd = 2 * j, 2 * j + 1
        lines += [f"prmt.b32 at, codes, side, {select:#x};", "add.u32 at, at, $10;"]
        if fp16:
            lines += [
                "ld.shared.b32 at, [at];",
                "mov.b32 {low, high}, at;",
                f"cvt.f32.f16 ${even}, low;",
                f"cvt.f32.f16 ${odd}, high;",
            ]
        else:
            lines += [f"ld.shared.b32 ${odd}, [at];", f"shl.b32 ${even}, ${odd}, 16;"]
    return "\n".join([*lines, "}"])


_FILL = tl.constexpr(fill_assembly(False))
_FILL_EARLY = tl.constexpr(fill_assembly(True))
_VALUES = tl.constexpr(values_assembly(False))
_VALUES_FP16 = tl.constexpr(values_assembly(True))
# Entry $1 of the second table, behind $3, becomes $2.
_OUTER_FILL = tl.constexpr(
    f"{{ .reg .b32 at; mad.lo.u32 at, $1, 4, $3; st.shared.f32 [at + {_PAIRS_BYTES}], $2; "
    "mov.u32 $0, 0; }"
)
# $0 the value of absmax code $1, in the second table behind $2.
_OUTER = tl.constexpr(
    f"{{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; ld.shared.f32 $0, [at + {_PAIRS_BYTES}]; }}"
)


@functools.cache
def pairs_on(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return int32 [256]: for every byte of codes its even value, of dtype, below its odd value."""
    byte = np.arange(256)
    bits = np.array(triton_prmt.target_bits(dtype), dtype=np.int64)
    even, odd = bits[byte >> 4], bits[byte & 15]
    if dtype is torch.bfloat16:
        # Read as fp32 the word is a little more than its upper half: of three the nearest.
        wanted = np.array(NF4_VALUES)[byte & 15] * triton_prmt.SCALES[dtype]
        near = np.stack([odd, odd - 1, odd + 1])
        read = ((near << 16 | even) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        error = np.abs(read.astype(np.float64) - wanted)
        odd = np.where(wanted == 0, odd, near[error.argmin(axis=0), byte])
    words = ((odd << 16 | even) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    return torch.from_numpy(words).to(device)


def suits(
    x: torch.Tensor, packed: torch.Tensor, N: int, blocksize: int, choice: VectorChoice
) -> bool:
    """Whether the kernel serves this: rows of whole blocks that the threads' registers hold."""
    M, K = x.shape
    return (
        choice.words > 0
        and M <= 2
        and choice.outputs <= N
        and K % blocksize == 0
        and choice.longest >= M * K
        and not any(address % 4 for address in addresses((x, packed)))
    )


def multiply_vectors(
    x: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    blocksize: int,
    choice: VectorChoice,
) -> None:
    """Fill y [M, N], unit column stride, with x W^T + bias for one or two contiguous rows of x.

    x is bf16 or fp16, and `suits` is true.
    """
    (M, K), N = x.shape, y.shape[1]
    gpu = gpu_of(x.device)
    packed, absmax, nested_absmax, nested_codebook, nested_offset = tables
    assert packed is not None
    lookup = "pairs" if gpu.backend == "cuda" else "select"
    early = gpu.backend == "cuda" and int(gpu.arch) >= 90
    parts = triton.next_power_of_2(K // (8 * WORDS))  # of a row, one thread's at least
    warps = max(choice.warps, M * parts * WORDS // (32 * choice.x_words))
    rows = max(1, choice.words * 32 * warps // (parts * WORDS))
    tiles = -(-N // rows)
    programs = max(1, choice.warps_per_multiprocessor // warps) * gpu.multiprocessors
    launch(
        nf4_linear_vector_fwd_kernel, (min(tiles, programs),),
        x.view(torch.int32), packed.view(torch.int32), absmax, nested_absmax, nested_codebook,
        nested_offset, pairs_on(x.device, x.dtype) if lookup == "pairs" else None, bias, y,
        N, K // (8 * WORDS), tiles, y.stride(0),
        BLOCK=blocksize // (8 * WORDS), ROWS=rows, PARTS=parts,
        EVEN=parts * 8 * WORDS == K, WHOLE=N % rows == 0, XS=M,
        NESTED=nested_absmax is not None, LOOKUP=lookup, FP16=x.dtype is torch.float16,
        DIVISOR=triton_prmt.SCALES[x.dtype] if lookup == "pairs" else 1.0, EARLY=early,
        ROW_OUTER=NESTED_BLOCKSIZE % (K // blocksize) == 0,
        num_warps=warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


@triton.jit
def _values(word, lane, table, LOOKUP: tl.constexpr, FP16: tl.constexpr):
    """The values of a word's eight codes, in order; times DIVISOR if they are looked up."""
    if LOOKUP == "pairs":
        return tl.inline_asm_elementwise(
            _VALUES_FP16 if FP16 else _VALUES, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [word, lane, table], dtype=(tl.float32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            nf4_select(word >> 4), nf4_select(word), nf4_select(word >> 12), nf4_select(word >> 8),
            nf4_select(word >> 20), nf4_select(word >> 16), nf4_select(word >> 28),
            nf4_select(word >> 24),
        )  # fmt: skip


@triton.jit
def _load_x(x_ptr, parts, m, EVEN: tl.constexpr, PARTS: tl.constexpr):
    """Row m of x as four tensors [1, words], pair i of every four; zeros behind it."""
    k = tl.arange(0, 4 * _WORDS * PARTS)
    here = x_ptr + m * (4 * _WORDS * parts) + k
    x = tl.load(here) if EVEN else tl.load(here, mask=k < 4 * _WORDS * parts, other=0)
    x02, x13 = tl.split(tl.reshape(x, [_WORDS * PARTS, 2, 2]))
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    return x0[None, :], x1[None, :], x2[None, :], x3[None, :]


@triton.jit
def _down(tile, N, line, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """The lines of a tile; past the last row of W that row again."""
    if WHOLE:
        return line
    else:
        return tl.minimum(line, N - 1 - tile * ROWS)


@triton.jit
def _load(
    packed_ptr, absmax_ptr, tile, N, parts, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile's words [ROWS, words], and the absmax or its code of every thread's [ROWS, PARTS]."""
    first = tile.to(tl.int64) * ROWS
    down = _down(tile, N, tl.arange(0, ROWS), ROWS, WHOLE)[:, None]
    word = tl.arange(0, _WORDS * PARTS)[None, :]
    part = tl.arange(0, PARTS)[None, :]
    codes_ptr = packed_ptr + first * (_WORDS * parts) + (down * (_WORDS * parts) + word)
    scales_ptr = absmax_ptr + first * (parts // BLOCK) + (down * (parts // BLOCK) + part // BLOCK)
    if EVEN:
        return tl.load(codes_ptr), tl.load(scales_ptr)
    else:
        return (
            tl.load(codes_ptr, mask=word < _WORDS * parts, other=0),
            tl.load(scales_ptr, mask=part < parts, other=0),
        )


@triton.jit
def _dots(values, x, scale, FP16: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The tile's dots with a row of x [ROWS]."""
    dtype: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    dots = tl.zeros(values[0].shape, tl.float32)
    for i in tl.static_range(0, 4):
        even = (x[i] & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        odd = (x[i] >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        even = tl.broadcast_to(even, dots.shape)
        odd = tl.broadcast_to(odd, dots.shape)
        dots = tl.fma(values[2 * i], even, dots) if i > 0 else values[2 * i] * even
        dots = tl.fma(values[2 * i + 1], odd, dots)
    dots = tl.sum(tl.reshape(dots, [ROWS, PARTS, _WORDS]), axis=2)
    return tl.sum(dots * scale, axis=1)


@triton.jit(do_not_specialize=["parts", "tiles"])
def nf4_linear_vector_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, nested_offset_ptr,
    pairs_ptr, bias_ptr, out_ptr, N, parts, tiles, out_stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, XS: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    DIVISOR: tl.constexpr, FP16: tl.constexpr, EARLY: tl.constexpr, ROW_OUTER: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows of W in turn, PARTS threads a row. x_ptr points to pairs of elements.

    A row has `parts` of the threads' parts, a block of absmax has BLOCK of them.
    """
    table = 0
    lane = 0
    if LOOKUP == "pairs":
        table, lane = tl.inline_asm_elementwise(
            _FILL_EARLY if EARLY else _FILL, "=r,=r,l", [pairs_ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    # Only here may be read what a kernel before this one may have written.
    offset = 0.0
    outer_values = 0.0
    entry = tl.arange(0, 256)
    if NESTED:
        offset = tl.load(nested_offset_ptr)
        if LOOKUP == "pairs":
            outer_values = tl.load(nested_codebook_ptr + entry)
    tile = tl.program_id(0)
    codes, scales = _load(packed_ptr, absmax_ptr, tile, N, parts, BLOCK, ROWS, PARTS, WHOLE, EVEN)
    x0 = _load_x(x_ptr, parts, 0, EVEN, PARTS)
    x1 = x0
    if XS > 1:
        x1 = _load_x(x_ptr, parts, 1, EVEN, PARTS)
    if NESTED and LOOKUP == "pairs":
        tl.inline_asm_elementwise(
            _OUTER_FILL, "=r,r,f,r", [entry, outer_values, table], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
        table = tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, $1;", "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
        )
    part = tl.arange(0, PARTS)[None, :]
    for _ in range(tile, tiles, tl.num_programs(0)):
        # The next tile's bytes are on their way while this one's are multiplied.
        following = tile + tl.num_programs(0)
        next_codes, next_scales = _load(
            packed_ptr, absmax_ptr, tl.minimum(following, tiles - 1), N, parts, BLOCK, ROWS, PARTS,
            WHOLE, EVEN,
        )  # fmt: skip
        scale = scales
        if NESTED:
            first = tile.to(tl.int64) * ROWS * (parts // BLOCK)
            at = _down(tile, N, tl.arange(0, ROWS), ROWS, WHOLE)[:, None] * (parts // BLOCK)
            at += (first % _NESTED).to(tl.int32)
            outer = nested_absmax_ptr + first // _NESTED
            if ROW_OUTER:
                outer = tl.broadcast_to(tl.load(outer + at // _NESTED), scales.shape)
            elif EVEN:
                outer = tl.load(outer + (at + part // BLOCK) // _NESTED)
            else:
                outer += (at + part // BLOCK) // _NESTED
                outer = tl.load(outer, mask=part < parts, other=0.0)
            code = scales.to(tl.int32)
            if LOOKUP == "pairs":
                scale = tl.inline_asm_elementwise(
                    _OUTER, "=f,r,r", [code, table], dtype=tl.float32, is_pure=True, pack=1
                )
            else:
                scale = tl.load(nested_codebook_ptr + code)
            scale = tl.fma(scale, outer, tl.broadcast_to(offset, outer.shape))
        values = _values(codes, lane, table, LOOKUP, FP16)
        n = tile * ROWS + tl.arange(0, ROWS)
        bias = tl.zeros([ROWS], tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        for m in tl.static_range(0, XS):
            y = _dots(values, x0 if m == 0 else x1, scale, FP16, ROWS, PARTS)
            y = y * (1.0 / DIVISOR)
            to = out_ptr + n + m * out_stride.to(tl.int64)
            tl.store(to, (y + bias).to(out_ptr.dtype.element_ty), mask=n < N)
        codes = next_codes
        scales = next_scales
        tile = following
