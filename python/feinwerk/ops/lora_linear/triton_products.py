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


def tiles_of(gpu: Gpu, dtype: torch.dtype, rank: int, length: int) -> Tiles:
    """The tile of a product over long rows: x's rows, a step along them, ranks."""
    if gpu.backend == "interpreter":
        long = max(64, min(1024, triton.next_power_of_2(length)))
        return Tiles(64, long, max(16, triton.next_power_of_2(min(rank, 256))), 4, 1)
    low = dtype is torch.bfloat16
    width = max(16, triton.next_power_of_2(min(rank, 64 if low else 16)))
    # A mask of dropout comes 64 columns at a time.
    return Tiles(32, 128 if low and width == 16 else 64, width, 4, 2 if gpu.backend == "hip" else 4)


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
def parted_dot(a, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a b for an fp32 b: exact products of a and the PARTS of b, or fp32 ones."""
    if PARTS == 0:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision=PRECISION)
    else:
        part = b.to(a.dtype)
        acc = tl.dot(a, part, acc)
        if PARTS > 1:
            rest = b - part.to(tl.float32)
            part = rest.to(a.dtype)
            acc = tl.dot(a, part, acc)
            if PARTS > 2:
                rest = rest - part.to(tl.float32)
                acc = tl.dot(a, rest.to(a.dtype), acc)
    return acc


@triton.jit
def split_dot(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a b for two fp32 tiles; with SPLIT by three products of bf16 parts."""
    if SPLIT:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
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
