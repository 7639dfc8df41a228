"""The kernels of adamw_step: a program takes one tile of one tensor of the list, or walks on.

```
   tiles   | tensor, tile | tensor, tile | ...      program i reads entry i (and i + programs ...)
   table   row of a tensor: addresses, sizes, what depends on its step
   tile    plain: ELEMENTS of the tensor      coded: BLOCKS blocks of up to SIZE elements, or one
                                                     block in pieces, when registers do not hold it
```
Nothing is fused and every operation rounds once, in the order of the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from feinwerk.ops.adamw_step import triton_ptx as ptx
from feinwerk.ops.adamw_step.triton_codes import fresh, look_up, signed_codes, unsigned_codes
from feinwerk.triton_lib import philox_word, philox_words

# Columns of the table.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, ABSMAX, ABSMAX_SQ = (tl.constexpr(i) for i in range(7))
STEP_SIZE, CORRECTION, COUNT, COLS, BLOCK, FIRST, ROW = (tl.constexpr(i) for i in range(7, 14))
COLUMNS = 16


@triton.jit
def _pointer(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """A tensor's address; VEC elements of it may be moved at once."""
    address = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, VEC * (DTYPE.primitive_bitwidth // 8))


@triton.jit
def _number(row_ptr, column: tl.constexpr):
    """An fp32 number, whose bits the table holds."""
    return tl.load(row_ptr + column).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _left_out(found_ptr):
    """Whether the step is to change nothing."""
    if found_ptr is None:
        return tl.full([], 0, tl.int1)
    else:
        return tl.load(found_ptr).to(tl.float64) != 0


@triton.jit
def _factor(sign, clip_ptr, scale_ptr):
    """What every gradient is multiplied by."""
    if clip_ptr is not None:
        sign = sign * tl.load(clip_ptr).to(tl.float32)
    if scale_ptr is not None:
        sign = tl.div_rn(sign, tl.load(scale_ptr).to(tl.float32))
    return sign


@triton.jit
def _load_param(row_ptr, offsets, mask, MASTER: tl.constexpr, VEC: tl.constexpr):
    """The fp32 parameter, joined with its remainder where it has one."""
    if MASTER == "fp32":
        return tl.load(_pointer(row_ptr, PARAM, tl.float32, VEC) + offsets, mask=mask, other=0.0)
    high = tl.load(_pointer(row_ptr, PARAM, tl.int16, VEC) + offsets, mask=mask, other=0)
    bits = high.to(tl.int32) << 16
    if MASTER == "remainder":
        low = tl.load(_pointer(row_ptr, REMAINDER, tl.int16, VEC) + offsets, mask=mask, other=0)
        bits += low.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _words(seed, row, first, offsets, begin, DENSE: tl.constexpr, PARTS: tl.constexpr):
    """The random words of elements `first + offsets`; DENSE: offsets are a run from `begin` on.

    Such a run, whose start is a multiple of 64, has every word of its counters, so that each is
    drawn once; the words of a counter are 16 elements apart.
    """
    if DENSE:
        GROUPS: tl.constexpr = offsets.numel // 64
        W: tl.constexpr = offsets.shape[len(offsets.shape) - 1]
        index = (first + begin) // 64 * 16
        index += (tl.arange(0, GROUPS)[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int64)
        w0, w1, w2, w3 = philox_words(seed, row, index)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.permute(tl.reshape(words, [GROUPS, 16, 4]), (0, 2, 1))
        # Where offsets are parts of blocks, the first parts come first.
        words = tl.permute(tl.reshape(words, [offsets.numel // PARTS // W, PARTS, W]), (1, 0, 2))
        return tl.reshape(words, offsets.shape)
    else:
        return philox_word(seed, row, first + offsets)


@triton.jit
def _store_param(
    row_ptr, seed_ptr, p, offsets, begin, mask, MASTER: tl.constexpr, VEC: tl.constexpr,
    DENSE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if MASTER == "fp32":
        tl.store(_pointer(row_ptr, PARAM, tl.float32, VEC) + offsets, p, mask=mask)
    else:
        high_ptr = _pointer(row_ptr, PARAM, tl.int16, VEC) + offsets
        bits = p.to(tl.int32, bitcast=True)
        if MASTER == "remainder":
            bits = tl.where(p == p, bits, 0x7FC00000)
            tl.store(high_ptr, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
            low_ptr = _pointer(row_ptr, REMAINDER, tl.int16, VEC) + offsets
            tl.store(low_ptr, bits.to(tl.int16), mask=mask)
        else:
            row, first = tl.load(row_ptr + ROW), tl.load(row_ptr + FIRST)
            words = _words(tl.load(seed_ptr), row, first, offsets, begin, DENSE, PARTS)
            rounded = (bits + (words >> 16).to(tl.int32)) >> 16
            tl.store(high_ptr, tl.where(p == p, rounded, 0x7FC0).to(tl.int16), mask=mask)


@triton.jit
def _advance(g, m, v, weight1, decay1, weight2):
    """The new moments."""
    return m + (g - m) * weight1, v * decay1 + (g * g) * weight2


@triton.jit
def _descend(row_ptr, p, m, v, floor, shrink):
    """The new parameter."""
    ratio = tl.div_rn(m, tl.sqrt_rn(v) * _number(row_ptr, CORRECTION) + floor)
    return p * shrink - ratio * _number(row_ptr, STEP_SIZE)


@triton.jit
def adamw_step_plain_kernel(
    table_ptr, tiles_ptr, clip_ptr, scale_ptr, found_ptr, seed_ptr,
    sign, weight1, decay1, weight2, floor, shrink,
    GRAD_DTYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, ELEMENTS: tl.constexpr,
    VEC: tl.constexpr, DENSE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """States as they are or in bf16."""
    if _left_out(found_ptr):
        return
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * COLUMNS
    begin = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * ELEMENTS
    offsets = begin + tl.arange(0, ELEMENTS)
    mask = offsets < tl.multiple_of(tl.load(row_ptr + COUNT), VEC)
    factor = _factor(sign, clip_ptr, scale_ptr)
    grad_ptr = _pointer(row_ptr, GRAD, GRAD_DTYPE, VEC) + offsets
    m_ptr = _pointer(row_ptr, EXP_AVG, STATE, VEC) + offsets
    v_ptr = _pointer(row_ptr, EXP_AVG_SQ, STATE, VEC) + offsets
    g = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) * factor
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
    p = _load_param(row_ptr, offsets, mask, MASTER, VEC)
    m, v = _advance(g, m, v, weight1, decay1, weight2)
    p = _descend(row_ptr, p, m, v, floor, shrink)
    tl.store(m_ptr, m.to(STATE), mask=mask)
    tl.store(v_ptr, v.to(STATE), mask=mask)
    _store_param(row_ptr, seed_ptr, p, offsets, begin, mask, MASTER, VEC, DENSE, 1)


@triton.jit
def _coded_moments(
    row_ptr, map_ptr, tables, offsets, mask, absmax, absmax_sq, factor, weight1, decay1, weight2,
    GRAD_DTYPE: tl.constexpr, VEC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Decode, and advance."""
    m_ptr = _pointer(row_ptr, EXP_AVG, tl.uint8, VEC) + offsets
    v_ptr = _pointer(row_ptr, EXP_AVG_SQ, tl.uint8, VEC) + offsets
    grad_ptr = _pointer(row_ptr, GRAD, GRAD_DTYPE, VEC) + offsets
    g = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) * factor
    codes = tl.load(m_ptr, mask=mask, other=127)
    codes_sq = tl.load(v_ptr, mask=mask, other=0)
    if PTX:
        m, v = ptx.decode(codes, tables, True), ptx.decode(codes_sq, tables, False)
    else:
        entries = tl.arange(0, 256)
        m = look_up(tl.load(map_ptr + entries), codes.to(tl.int32))
        v = look_up(tl.load(map_ptr + 256 + entries), codes_sq.to(tl.int32))
    return _advance(g, m * absmax, v * absmax_sq, weight1, decay1, weight2)


@triton.jit
def _store_codes(
    row_ptr, map_ptr, tables, offsets, mask, m, v, inverse, inverse_sq, VEC: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The nearest codes; a positive v never takes the code of zero."""
    m_ptr = _pointer(row_ptr, EXP_AVG, tl.uint8, VEC) + offsets
    v_ptr = _pointer(row_ptr, EXP_AVG_SQ, tl.uint8, VEC) + offsets
    if PTX:
        tl.store(m_ptr, ptx.encode(m, inverse, tables), mask=mask)
        tl.store(v_ptr, ptx.encode_positive(v, inverse_sq, tables), mask=mask)
    else:
        entries = tl.arange(0, 256)
        codes = signed_codes(m * inverse, tl.load(map_ptr + 512 + entries))
        tl.store(m_ptr, codes.to(tl.uint8), mask=mask)
        codes = unsigned_codes(v * inverse_sq, tl.load(map_ptr + 768 + entries))
        codes = tl.where((v > 0) & (inverse_sq > 0), tl.maximum(codes, 1), codes)
        tl.store(v_ptr, codes.to(tl.uint8), mask=mask)


@triton.jit
def _coded_tile(
    row_ptr, first_block, map_ptr, tables, seed_ptr, factor, weight1, decay1, weight2, floor,
    shrink, GRAD_DTYPE: tl.constexpr, MASTER: tl.constexpr, BLOCKS: tl.constexpr,
    SIZE: tl.constexpr, WHOLE: tl.constexpr, VEC: tl.constexpr, DENSE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks from `first_block` on; tensors have a row for each part of a block.

    With PTX a part is what a warp moves at once, 4 elements a thread; the first parts of all blocks
    come first, so that a warp has all parts of a block.
    """
    PARTS: tl.constexpr = SIZE // 128 if PTX and SIZE > 128 else 1
    block = first_block + tl.arange(0, BLOCKS)
    there = block < tl.load(row_ptr + COUNT)
    part = tl.arange(0, PARTS)[:, None]
    column = _rows(part, PARTS, BLOCKS) * (SIZE // PARTS) + tl.arange(0, SIZE // PARTS)[None, :]
    begin = first_block * SIZE
    mask = _rows(there[None, :], PARTS, BLOCKS)
    if WHOLE:
        offsets = begin + (_rows(tl.arange(0, BLOCKS)[None, :], PARTS, BLOCKS) * SIZE + column)
        mask = tl.broadcast_to(mask, offsets.shape)
    else:
        # In units of VEC, so that their multiples are known to be such.
        cols, size = tl.load(row_ptr + COLS) // VEC, tl.load(row_ptr + BLOCK) // VEC
        a_row = tl.cdiv(cols, size)
        # From the first block's row on: fewer blocks than 2^31, of which division is cheap.
        row = first_block // a_row
        later = (first_block - row * a_row).to(tl.int32) + tl.arange(0, BLOCKS)
        down = later // a_row.to(tl.int32)
        start = (later - down * a_row.to(tl.int32)).to(tl.int64) * size
        length = _rows(tl.minimum(size, cols - start)[None, :], PARTS, BLOCKS) * VEC
        offsets = _rows(((row + down) * cols + start)[None, :], PARTS, BLOCKS) * VEC + column
        mask = mask & (column < length)
    absmax_ptr = _pointer(row_ptr, ABSMAX, tl.float32, 1) + block
    absmax_sq_ptr = _pointer(row_ptr, ABSMAX_SQ, tl.float32, 1) + block
    absmax = tl.load(absmax_ptr, mask=there, other=0.0)[None, :]
    absmax_sq = tl.load(absmax_sq_ptr, mask=there, other=0.0)[None, :]
    p = _load_param(row_ptr, offsets, mask, MASTER, VEC)
    m, v = _coded_moments(
        row_ptr, map_ptr, tables, offsets, mask, _rows(absmax, PARTS, BLOCKS),
        _rows(absmax_sq, PARTS, BLOCKS), factor, weight1, decay1, weight2, GRAD_DTYPE, VEC, PTX,
    )  # fmt: skip
    most, most_sq = _largest(tl.abs(m), PARTS, BLOCKS), _largest(tl.abs(v), PARTS, BLOCKS)
    if PTX:
        larger = _rows(tl.maximum(most, most_sq)[None, :], PARTS, BLOCKS)
        ratio = ptx.quotient(m, v, larger, _number(row_ptr, CORRECTION), floor)
        p = p * shrink - ratio * _number(row_ptr, STEP_SIZE)
    else:
        p = _descend(row_ptr, p, m, v, floor, shrink)
    _store_param(row_ptr, seed_ptr, p, offsets, begin, mask, MASTER, VEC, DENSE, PARTS)
    most, most_sq, inverse, inverse_sq = fresh(most, most_sq, PTX)
    if PTX:
        ptx.store(absmax_ptr, most, there)
        ptx.store(absmax_sq_ptr, most_sq, there)
    else:
        tl.store(absmax_ptr, most, mask=there)
        tl.store(absmax_sq_ptr, most_sq, mask=there)
    _store_codes(
        row_ptr, map_ptr, tables, offsets, mask, m, v, _rows(inverse[None, :], PARTS, BLOCKS),
        _rows(inverse_sq[None, :], PARTS, BLOCKS), VEC, PTX,
    )  # fmt: skip


@triton.jit
def _rows(x, PARTS: tl.constexpr, BLOCKS: tl.constexpr):
    """[parts or 1, blocks or 1] to a column, first parts first."""
    return tl.reshape(tl.broadcast_to(x, [PARTS, BLOCKS]), [PARTS * BLOCKS])[:, None]


@triton.jit
def _largest(x, PARTS: tl.constexpr, BLOCKS: tl.constexpr):
    """The maximum of each block; that of NaN alone is zero."""
    x = tl.reshape(x, [PARTS, BLOCKS, x.shape[1]])
    return tl.maximum(tl.max(tl.max(x, axis=0), axis=1), 0.0)


@triton.jit
def _entry(tiles_ptr, number, tiles):
    """The tensor and the tile of an entry, or of the last one behind it."""
    entry_ptr = tiles_ptr + 2 * tl.minimum(number, tiles - 1).to(tl.int64)
    return tl.load(entry_ptr), tl.load(entry_ptr + 1)


@triton.jit(do_not_specialize=["tiles"])
def adamw_step_coded_kernel(
    table_ptr, tiles_ptr, map_ptr, clip_ptr, scale_ptr, found_ptr, seed_ptr,
    sign, weight1, decay1, weight2, floor, shrink, tiles,
    GRAD_DTYPE: tl.constexpr, MASTER: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
    WHOLE: tl.constexpr, VEC: tl.constexpr, DENSE: tl.constexpr, COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Codes, in blocks that registers hold. WHOLE: every block has SIZE elements.

    PTX: few programs walk over all tiles, with their tables in shared memory; map_ptr: its words.
    """
    if _left_out(found_ptr):
        return
    factor = _factor(sign, clip_ptr, scale_ptr)
    program = tl.program_id(0)
    if PTX:
        tables = ptx.fill(map_ptr)
        programs = tl.num_programs(0)
        tensor, tile = _entry(tiles_ptr, program, tiles)
        for now in range(program, tiles, programs):
            row_ptr = table_ptr + tensor.to(tl.int64) * COLUMNS
            first_block = tile.to(tl.int64) * BLOCKS
            # Which ones are next is asked for ahead: it comes from far.
            tensor, tile = _entry(tiles_ptr, now + programs, tiles)
            _coded_tile(
                row_ptr, first_block, map_ptr, tables, seed_ptr, factor, weight1, decay1, weight2,
                floor, shrink, GRAD_DTYPE, MASTER, BLOCKS, SIZE, WHOLE, VEC, DENSE, PTX,
            )  # fmt: skip
    else:
        entry = tiles_ptr + 2 * program.to(tl.int64)
        row_ptr = table_ptr + tl.load(entry).to(tl.int64) * COLUMNS
        first_block = tl.load(entry + 1).to(tl.int64) * BLOCKS
        _coded_tile(
            row_ptr, first_block, map_ptr, None, seed_ptr, factor, weight1, decay1, weight2,
            floor, shrink, GRAD_DTYPE, MASTER, BLOCKS, SIZE, WHOLE, VEC, DENSE, PTX,
        )  # fmt: skip


@triton.jit
def adamw_step_large_kernel(
    table_ptr, tiles_ptr, map_ptr, clip_ptr, scale_ptr, found_ptr, seed_ptr,
    sign, weight1, decay1, weight2, floor, shrink,
    GRAD_DTYPE: tl.constexpr, MASTER: tl.constexpr, PIECE: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes, a block in pieces: its moments are found twice, for their maxima and to be written."""
    if _left_out(found_ptr):
        return
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * COLUMNS
    block = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64)
    cols, size = tl.load(row_ptr + COLS), tl.load(row_ptr + BLOCK)
    a_row = tl.cdiv(cols, size)
    row = block // a_row
    start = (block - row * a_row) * size
    end = tl.multiple_of(tl.minimum(size, cols - start), VEC)
    start = tl.multiple_of(row * cols + start, VEC)
    block += tl.arange(0, 1)
    absmax_ptr = _pointer(row_ptr, ABSMAX, tl.float32, 1) + block
    absmax_sq_ptr = _pointer(row_ptr, ABSMAX_SQ, tl.float32, 1) + block
    absmax, absmax_sq = tl.load(absmax_ptr), tl.load(absmax_sq_ptr)
    factor = _factor(sign, clip_ptr, scale_ptr)
    lane = tl.arange(0, PIECE).to(tl.int64)
    most = tl.zeros([PIECE], tl.float32)
    most_sq = tl.zeros([PIECE], tl.float32)
    for piece in range(0, end, PIECE):
        mask = piece + lane < end
        m, v = _coded_moments(
            row_ptr, map_ptr, None, start + piece + lane, mask, absmax, absmax_sq, factor,
            weight1, decay1, weight2, GRAD_DTYPE, VEC, False,
        )  # fmt: skip
        most, most_sq = tl.maximum(most, tl.abs(m)), tl.maximum(most_sq, tl.abs(v))
    most, most_sq, inverse, inverse_sq = fresh(
        tl.max(most, axis=0, keep_dims=True), tl.max(most_sq, axis=0, keep_dims=True), False
    )
    for piece in range(0, end, PIECE):
        mask, offsets = piece + lane < end, start + piece + lane
        p = _load_param(row_ptr, offsets, mask, MASTER, VEC)
        m, v = _coded_moments(
            row_ptr, map_ptr, None, offsets, mask, absmax, absmax_sq, factor,
            weight1, decay1, weight2, GRAD_DTYPE, VEC, False,
        )  # fmt: skip
        p = _descend(row_ptr, p, m, v, floor, shrink)
        _store_param(row_ptr, seed_ptr, p, offsets, 0, mask, MASTER, VEC, False, 1)
        _store_codes(row_ptr, map_ptr, None, offsets, mask, m, v, inverse, inverse_sq, VEC, False)
    tl.store(absmax_ptr, most)
    tl.store(absmax_sq_ptr, most_sq)
