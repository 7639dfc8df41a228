"""square_sum in Triton: sums of blocks in the reference's order, then rows in integers.

```
   row     | 1024 elements | 1024 elements | rest |   square_sum_blocks_kernel: a column of 16 lanes
   blocks    sum             sum             sum      goes down each block, then folds
   rows      sum + sum + sum, one after the other     square_sum_rows_kernel, and cuts it into limbs
   limbs     integers: added by any program in any order
```
One launch of the first kernel for all tensors of a dtype whose rows have as many lanes, and one of
the second for all of them; nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from feinwerk.triton_lib import (
    INTERPRETED,
    Gpu,
    addresses,
    all_registers,
    gpu_of,
    launch,
    tiles_on,
    upload,
)

_LIMBS, _LENGTH = 20, 22
_LIMB_BITS = tl.constexpr(30)
_LIMB = tl.constexpr((1 << 30) - 1)
# The exponent of an fp64 number less this is its lowest bit's, counted from 2^-300.
_BIAS = tl.constexpr(1075 - 300)
_LANES, _BLOCK = 16, 1024
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the tables: of tensors for the first kernel, of rows for the second.
_ADDRESS, _COLS, _BLOCKS, _FIRST = (tl.constexpr(i) for i in range(4))
_ROWS, _A_ROW, _SUMS = (tl.constexpr(i) for i in range(3))
_COLUMNS = tl.constexpr(4)


class Choice(NamedTuple):
    """How tensors are cut: the one place that decides it."""

    lanes: int  # of all blocks of a program
    rows: int  # of a program of the second kernel
    warps: int


def choose(gpu: Gpu) -> Choice:
    """Return the configuration for a GPU."""
    if gpu.backend == "interpreter":
        return Choice(8192, 1024, 4)  # few programs: their number is what takes time there
    return Choice(512, 128, 4)


@triton.jit
def square_sum_blocks_kernel(
    table_ptr, tiles_ptr, sums_ptr,
    DTYPE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Sum the squares of blocks of SIZE elements: LANES lanes in turn, then folded."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * _COLUMNS
    first_block = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * BLOCKS
    address = tl.load(row_ptr + _ADDRESS).to(tl.pointer_type(DTYPE))
    address = tl.multiple_of(address, VEC * (DTYPE.primitive_bitwidth // 8))
    cols, blocks = tl.load(row_ptr + _COLS), tl.load(row_ptr + _BLOCKS)
    a_row = tl.cdiv(cols, SIZE)
    block = first_block + tl.arange(0, BLOCKS)
    # From the first block's row on: fewer blocks than 2^31, of which division is cheap.
    row = first_block // a_row
    later = (first_block - row * a_row).to(tl.int32) + tl.arange(0, BLOCKS)
    down = later // a_row.to(tl.int32)
    begin = (later - down * a_row.to(tl.int32)).to(tl.int64) * SIZE
    length = tl.where(block < blocks, tl.minimum(cols - begin, SIZE), 0)
    start = tl.multiple_of((row + down) * cols + begin, VEC)[:, None]
    length = tl.multiple_of(length, VEC)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    total = tl.zeros([BLOCKS, LANES], tl.float64)
    longest = tl.minimum(cols, SIZE).to(tl.int32)
    for step in tl.range(0, longest, LANES, loop_unroll_factor=8):
        at = step + lane
        x = tl.load(address + start + at, mask=at < length, other=0.0).to(tl.float64)
        # The square of an fp32 number has 48 bits: exact, fused or not.
        total = tl.fma(x, x, total)
    folded = _fold(total, BLOCKS, LANES)
    first = tl.load(row_ptr + _FIRST)
    tl.store(sums_ptr + first + block, folded, mask=block < blocks)


@triton.jit
def _fold(total, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """Add the upper half of the lanes to the lower one until one is left."""
    if LANES == 1:
        return tl.reshape(total, [BLOCKS])
    else:
        halves = tl.reshape(total, [BLOCKS, 2, LANES // 2])
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        return _fold(low + high, BLOCKS, LANES // 2)


@triton.jit
def square_sum_rows_kernel(table_ptr, tiles_ptr, sums_ptr, limbs_ptr, ROWS: tl.constexpr):
    """Add up the blocks of rows one after the other, and the rows exactly."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * _COLUMNS
    row = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < tl.load(row_ptr + _ROWS)
    a_row = tl.load(row_ptr + _A_ROW)
    ptr = sums_ptr + tl.load(row_ptr + _SUMS) + row * a_row
    total = tl.load(ptr, mask=there, other=0.0)
    for i in tl.range(1, a_row, loop_unroll_factor=4):
        total += tl.load(ptr + i, mask=there, other=0.0)
    _add_exactly(total, limbs_ptr, ROWS)


@triton.jit
def _add_exactly(total, limbs_ptr, ROWS: tl.constexpr):
    """Add sums of squares, multiples of 2^-298 below 2^300, to limbs that start at 2^-300."""
    bits = total.to(tl.int64, bitcast=True)
    exponent = bits >> 52
    special = exponent == 0x7FF
    fraction = bits & 0xFFFFFFFFFFFFF
    integer = tl.where(special | (bits == 0), 0, fraction | (1 << 52))
    shift = exponent - _BIAS
    integer = integer >> tl.minimum(tl.maximum(-shift, 0), 63)  # zeros
    shift = tl.where(special, 0, tl.maximum(shift, 0)).to(tl.int32)
    limb = shift // _LIMB_BITS
    inside = (shift - limb * _LIMB_BITS).to(tl.int64)
    low = (integer << inside) & _LIMB
    rest = integer >> (-inside + _LIMB_BITS)
    middle, high = rest & _LIMB, rest >> _LIMB_BITS
    # The counters lie behind the limbs: of infinities, then of NaN.
    counter = tl.where(fraction == 0, 20, 21)
    at = tl.arange(0, 32)[None, :]
    behind = at - limb[:, None]
    sums = tl.where(behind == 0, low[:, None], 0) + tl.where(behind == 1, middle[:, None], 0)
    sums += tl.where(behind == 2, high[:, None], 0)
    sums += (special[:, None] & (at == counter[:, None])).to(tl.int64)
    at = tl.arange(0, 32)
    tl.atomic_add(limbs_ptr + at, tl.sum(sums, axis=0), mask=at < 22, sem="relaxed")


def square_sum(tensors: Sequence[torch.Tensor]) -> Any:
    """Sum the squares of every row in fp64, and the rows exactly."""
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "cpu" and not INTERPRETED:
        return NotImplemented
    limbs = torch.zeros(_LENGTH, dtype=torch.int64, device=device)
    choice = choose(gpu_of(device))
    kept = [tensor.contiguous() for tensor in tensors if tensor.numel() > 0]
    if not kept:
        return limbs
    tables: dict[tuple[torch.dtype, int, int], tuple[list[int], list[int]]] = {}
    of_rows: list[int] = []
    row_tiles: list[int] = []
    sums = 0
    for tensor, place in zip(kept, addresses(kept), strict=True):
        rows = tensor.shape[0] if tensor.dim() > 1 else tensor.numel()
        cols = tensor.numel() // rows
        a_row = -(-cols // _BLOCK)
        lanes = min(_LANES, triton.next_power_of_2(cols))
        aligned = cols % 4 == 0 and place % (4 * tensor.element_size()) == 0
        kind = tensor.dtype, lanes, 4 if aligned else 1
        table, tiles = tables.setdefault(kind, ([], []))
        table += (place, cols, rows * a_row, sums)
        tiles.append(-(-rows * a_row // (choice.lanes // lanes)))
        of_rows += (rows, a_row, sums, 0)
        row_tiles.append(-(-rows // choice.rows))
        sums += rows * a_row
    partial = torch.empty(sums, dtype=torch.float64, device=device)
    for (dtype, lanes, vector), (table, tiles) in tables.items():
        launch(
            square_sum_blocks_kernel, (sum(tiles),), upload(table, device),
            tiles_on(tuple(tiles), device), partial, DTYPE=_DTYPES[dtype],
            BLOCKS=choice.lanes // lanes, LANES=lanes, VEC=vector, SIZE=_BLOCK,
            num_warps=choice.warps, **all_registers(device),
        )  # fmt: skip
    launch(
        square_sum_rows_kernel, (sum(row_tiles),), upload(of_rows, device),
        tiles_on(tuple(row_tiles), device), partial, limbs, ROWS=choice.rows,
        num_warps=choice.warps,
    )  # fmt: skip
    return limbs
