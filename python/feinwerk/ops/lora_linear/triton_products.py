"""What the kernels of lora_linear share: products of parts, dropout's mask, the gain, their tiles.

A bf16 tile meets an fp32 operand as two or three bf16 parts of it, one after the other, which is
as good as fp32 and runs on the matrix units; fp16 and fp32 tiles are multiplied in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from feinwerk.triton_lib import Gpu, gpu_of, philox_words

# From so many additions on, the budget of a sum is wider than what two bf16 parts leave out.
_DEEP = 4096


class Tiles(NamedTuple):
    """The sides of a tile: rows, columns, rank; and how a program runs."""

    rows: int
    columns: int
    rank: int
    warps: int
    stages: int


def parts_of(dtype: torch.dtype, depth: int, exact: bool = False) -> int:
    """How many bf16 parts an fp32 operand is taken as; 0 multiplies in fp32, 1 if it is bf16."""
    if dtype is not torch.bfloat16:
        return 0
    if exact:
        return 1
    return 2 if depth >= _DEEP else 3


def precision_of(device: torch.device) -> str:
    """How fp32 tiles are multiplied: on NVIDIA as three tf32 products, else as they are."""
    return "tf32x3" if gpu_of(device).backend == "cuda" else "ieee"


def tiles_of(gpu: Gpu, dtype: torch.dtype, rank: int, length: int, parts: int) -> Tiles:
    """The tile of a product over long rows: x's rows, a step along them, ranks."""
    if gpu.backend == "interpreter":
        long = max(64, min(1024, triton.next_power_of_2(length)))
        return Tiles(64, long, max(16, triton.next_power_of_2(min(rank, 256))), 4, 1)
    low = dtype is torch.bfloat16
    width = max(16, triton.next_power_of_2(min(rank, 64 if low else 16)))
    # A mask of dropout comes 64 columns at a time.
    columns = 128 if low and width == 16 and parts < 3 else 64
    if low and parts < 3 and gpu.backend == "cuda" and gpu.arch != "80":
        # 64 rows take wgmma; with three parts and loads of single elements it does not compile.
        return Tiles(64, 64, width, 4, 5) if parts == 2 else Tiles(64, columns, width, 4, 3)
    return Tiles(32, columns, width, 4, 2 if gpu.backend == "hip" else 4)


def parts_of_length(gpu: Gpu, tiles: Tiles, length: int, programs: int) -> tuple[int, int]:
    """Into how many parts the length of long rows is split, and the elements of each.

    Enough for the GPU, where there are so many programs anyway; each has at least four steps.
    """
    steps = -(-length // tiles.columns)
    splits = max(1, min(steps // 4, 2 * gpu.multiprocessors // programs))
    part = -(-steps // splits)
    return -(-steps // part), part * tiles.columns


def parts_of_rows(gpu: Gpu, steps: int, least: int, programs: int) -> tuple[int, int]:
    """Into how many parts `steps` tiles of rows are split, and the tiles of each.

    So that there are `programs` programs more or less, each with at least so many steps.
    """
    splits = max(1, min(steps // least, programs))
    if gpu.backend == "interpreter":  # where a loop of thousands would take minutes
        splits = max(splits, -(-steps // 16))
    part = -(-steps // splits)
    return -(-steps // part) if part else 0, part


@triton.jit
def added_parts(source, step, splits, mask, AHEAD: tl.constexpr):
    """The sum of `splits` fp32 tiles, `step` apart, in their order, AHEAD loads at once."""
    total = tl.zeros(source.shape, tl.float32)
    number = tl.zeros(source.shape, tl.int32)
    for first in range(0, splits, AHEAD):
        for i in tl.static_range(AHEAD):
            total += tl.load(source, mask=mask & (number + first + i < splits), other=0.0)
            source += step
    return total


@triton.jit
def _rounded(b):
    """fp32 rounded to what bf16 holds, ties away from zero: by integers, as a conversion is slow.

    A NaN may become a number: the rest of it is NaN still.
    """
    bits = b.to(tl.uint32, bitcast=True) + 0x8000
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _beside(a, b):
    """Two bf16 tiles [n, r] as one [n, 2 r], column beside column."""
    return tl.reshape(tl.join(a.to(tl.bfloat16), b.to(tl.bfloat16)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def parted_zeros(ROWS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Where `parted_dot` adds up [ROWS, RANK]: twice as wide with two parts or three."""
    WIDTH: tl.constexpr = 2 * RANK if PARTS > 1 else RANK
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def parted_dot(a, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a b for an fp32 b: exact products of a and the PARTS of b, or fp32 ones.

    Parts lie beside each other, so that `a` is read once and a part is made by one warp, not by
    all; `parted_sum` ends the sum.
    """
    if PARTS == 0:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision=PRECISION)
    elif PARTS == 1:
        acc = tl.dot(a, b.to(a.dtype), acc)
    else:
        part = _rounded(b)
        rest = b - part
        if PARTS == 2:
            acc = tl.dot(a, _beside(part, rest), acc)
        else:
            second = _rounded(rest)
            acc = tl.dot(a, _beside(part, second), acc)
            rest = rest - second
            third = _rounded(rest)
            acc = tl.dot(a, _beside(third, rest - third), acc)
    return acc


@triton.jit
def parted_sum(acc, PARTS: tl.constexpr):
    """The sum [ROWS, RANK] of what `parted_dot` has added up."""
    if PARTS > 1:
        acc = tl.sum(tl.reshape(acc, [acc.shape[0], acc.shape[1] // 2, 2]), axis=2)
    return acc


@triton.jit
def split_dot(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a b for two fp32 tiles; with SPLIT by three products of bf16 parts."""
    if SPLIT:
        a_part = _rounded(a)
        b_part = _rounded(b)
        a_high = a_part.to(tl.bfloat16)
        b_high = b_part.to(tl.bfloat16)
        a_low = (a - a_part).to(tl.bfloat16)
        b_low = (b - b_part).to(tl.bfloat16)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def kept(seed_ptr, row, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile dropout keeps: int64 rows, COLUMNS from `first`, multiples of 64.

    Four words of one counter lie 16 columns apart, so that no word is drawn for nothing.
    """
    index = first // 4 + tl.arange(0, COLUMNS // 4).to(tl.int64)
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.int64)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr), zero + row[:, None], zero + index[None, :])
    least = threshold.to(tl.uint32)
    k0 = (w0 >= least).to(tl.int8)
    k1 = (w1 >= least).to(tl.int8)
    k2 = (w2 >= least).to(tl.int8)
    k3 = (w3 >= least).to(tl.int8)
    # Last two dimensions: the low and the high bit of the word's number.
    words = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    words = tl.reshape(words, [ROWS, COLUMNS // 64, 16, 4])
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), [ROWS, COLUMNS]) != 0


@triton.jit
def gain_of(magnitude_ptr, norm_ptr, n, mask):
    """The gain, magnitude / norm, of rows of W, fp32; 0 where the norm is."""
    norm = tl.load(norm_ptr + n, mask=mask, other=0.0)
    magnitude = tl.load(magnitude_ptr + n, mask=mask, other=0.0).to(tl.float32)
    safe = tl.where(norm > 0, norm, 1.0)
    return tl.where(norm > 0, tl.div_rn(magnitude, safe), 0.0)
