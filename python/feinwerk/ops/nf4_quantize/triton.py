"""nf4_quantize in Triton: one pass over the weight; a code is one look-up and one comparison.

A scaled weight v falls into one of 33 bins of width 1/16; no bin holds two of the 15 thresholds, so

```
code = thresholds in lower bins  +  (v > the threshold in v's bin)        both from one 8-byte entry
```
which is exact because the bin's number, a rounded fp32 sum, never falls when v grows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from feinwerk.codebook import NF4_THRESHOLDS
from feinwerk.triton_lib import Gpu, gpu_of, launch

# v * 16 + _SHIFT has the bin's number in the low 6 bits of its fp32 pattern: 1 for v = -1 to 33, 34
# for infinity. A NaN's low 6 bits are 0 or 63, entries that hold the code of NaN. Those of minus
# infinity are 0 as well, and it has NaN's code 0 by CUDA's rule, the only one where it occurs.
_SHIFT = tl.constexpr(float(2**23 + 17))
_INFINITY = tl.constexpr(0x7F800000)  # fp32 bits; those of a NaN are greater
_TINY = tl.constexpr(1e-38)  # the CPU rule's floor of the divisor


class Choice(NamedTuple):
    """How a weight is cut: the one place that decides it."""

    weights: int  # a program's, a multiple of the largest blocksize
    warps: int


def choose(gpu: Gpu) -> Choice:
    """Return the configuration for a GPU."""
    if gpu.backend == "interpreter":
        return Choice(16384, 4)  # few programs: their number is what takes time there
    return Choice(4096, 4)


def nf4_quantize(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
    choice: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize block by block; one flag, read at the end, tells of NaN and infinity.

    Args:
        weight: any shape, fp32, bf16 or fp16.
        blocksize: elements per absmax.
        rule: "cpu" or "cuda".
        allow_non_finite: quantize NaN and infinity instead of raising, and never synchronise.
        choice: another configuration than this GPU's own, for measurements.

    Returns:
        packed and absmax.

    Raises:
        ValueError: if the weight holds NaN or infinity and `allow_non_finite` is False.
    """
    flat = weight.reshape(-1).contiguous()
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=flat.device)
    flag = None if allow_non_finite else torch.zeros(1, dtype=torch.int32, device=flat.device)
    table = _bins_on(flat.device, rule)
    options = {"GROUP": 16 // flat.element_size(), "CPU_RULE": rule == "cpu"}
    choice = choice or choose(gpu_of(flat.device))
    whole, rest = divmod(count, blocksize)
    launch(
        nf4_quantize_fwd_kernel, (-(-whole * blocksize // choice.weights),),
        flat, packed, absmax, flag, table, whole,
        BLOCKSIZE=blocksize, BLOCKS=choice.weights // blocksize, CHECK=flag is not None,
        num_warps=choice.warps, **options,
    )  # fmt: skip
    launch(
        nf4_quantize_last_fwd_kernel, (int(rest > 0),),
        flat, packed, absmax, flag, table, count,
        BLOCKSIZE=blocksize, PIECE=min(blocksize, 1024), CHECK=flag is not None,
        num_warps=4, **options,
    )  # fmt: skip
    if flag is not None and not flag.is_meta and bool(flag):
        raise ValueError(
            "nf4_quantize: weight must be finite, got NaN or infinity; pass allow_non_finite=True "
            "to quantize it as bitsandbytes does"
        )
    return packed, absmax


def bins(rule: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the 64 entries of a rule: the threshold's fp32 bits << 32 | thresholds below."""
    thresholds = np.array(NF4_THRESHOLDS[rule], dtype=np.float32)
    numbers = (thresholds * np.float32(16) + np.float32(_SHIFT.value)).view(np.int32) & 63
    entries = np.empty(64, dtype=np.int64)
    for i in range(64):
        inside = thresholds[numbers == i]
        below = int((numbers < i).sum())
        if not 1 <= i <= 34:
            below = 15 if rule == "cpu" else 0
        limit = inside[0] if inside.size else np.float32(np.inf)
        entries[i] = int(limit.view(np.int32)) << 32 | below
    return entries


@functools.cache
def _bins_on(device: torch.device, rule: str) -> torch.Tensor:
    return torch.from_numpy(bins(rule)).to(device)


@triton.jit(do_not_specialize=["whole"])
def nf4_quantize_fwd_kernel(
    weight_ptr, packed_ptr, absmax_ptr, flag_ptr, bins_ptr, whole,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    CPU_RULE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCKS of the `whole` blocks that no end cuts; a thread holds groups of 16 bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    live = block < whole - first
    begin = (
        block[:, None, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE // GROUP)[None, :, None] * GROUP
    )
    at = begin + tl.arange(0, GROUP)[None, None, :]
    source = weight_ptr + first * BLOCKSIZE
    x = tl.load(source + at, mask=live[:, None, None], other=0.0).to(tl.float32)
    if CPU_RULE or CHECK:
        top = tl.max(tl.max(_magnitude(x, CPU_RULE, CHECK), 2), 1)
    else:  # a maximum of floats leaves NaN out, unless there is nothing else
        most = tl.max(tl.max(tl.abs(x), 2), 1)
        top = tl.where(most != most, 0.0, most).to(tl.int32, bitcast=True)
    if CHECK:
        tl.store(flag_ptr + block * 0, 1, mask=live & (top >= _INFINITY))
    absmax, floor = _absmax(top, CPU_RULE)
    tl.store(absmax_ptr + first + block, absmax, mask=live)
    scaled = x * tl.div_rn(1.0, floor)[:, None, None]
    code = _nearest(scaled, bins_ptr, CPU_RULE)
    pairs = tl.reshape(code, [BLOCKS, BLOCKSIZE // GROUP, GROUP // 2, 2])
    even, odd = tl.split(pairs)
    half = begin // 2 + tl.arange(0, GROUP // 2)[None, None, :]
    target = packed_ptr + first * (BLOCKSIZE // 2)
    tl.store(target + half, (even * 16 + odd).to(tl.uint8), mask=live[:, None, None])


@triton.jit(do_not_specialize=["count"])
def nf4_quantize_last_fwd_kernel(
    weight_ptr, packed_ptr, absmax_ptr, flag_ptr, bins_ptr, count,
    BLOCKSIZE: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
    CPU_RULE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantize the last block, of fewer than BLOCKSIZE weights; by the CPU rule it divides."""
    last = tl.cast(count, tl.int64) // BLOCKSIZE
    source = weight_ptr + last * BLOCKSIZE
    rest = (count - last * BLOCKSIZE).to(tl.int32)
    lane = tl.arange(0, PIECE)
    top = tl.max(lane * 0, 0)
    for piece in range(0, BLOCKSIZE, PIECE):
        at = piece + lane
        x = tl.load(source + at, mask=at < rest, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(_magnitude(x, CPU_RULE, CHECK), 0))
    if CHECK:
        tl.store(flag_ptr, 1, mask=top >= _INFINITY)
    _, floor = _absmax(top, CPU_RULE)
    tl.store(absmax_ptr + last, floor)  # the CPU rule keeps the floor; CUDA's is absmax itself
    for piece in range(0, BLOCKSIZE, PIECE):
        at = piece + lane
        x = tl.load(source + at, mask=at < rest, other=0.0).to(tl.float32)
        inverse = tl.div_rn(1.0, floor)
        scaled = tl.div_rn(x, tl.zeros_like(x) + floor) if CPU_RULE else x * inverse
        code = _nearest(scaled, bins_ptr, CPU_RULE)
        if CPU_RULE:
            code = tl.where(at == rest, 7, code)  # an odd end is padded with the code of 0.0
        even, odd = tl.split(tl.reshape(code, [PIECE // 2, 2]))
        half = piece // 2 + tl.arange(0, PIECE // 2)
        target = packed_ptr + last * (BLOCKSIZE // 2)
        tl.store(target + half, (even * 16 + odd).to(tl.uint8), mask=half * 2 < rest)


@triton.jit
def _magnitude(x, CPU_RULE: tl.constexpr, CHECK: tl.constexpr):
    """|x| as integers, which ranks NaN above infinity; CUDA's absmax leaves NaN out."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not CPU_RULE and not CHECK:
        bits = tl.where(bits > _INFINITY, 0, bits)
    return bits


@triton.jit
def _absmax(top, CPU_RULE: tl.constexpr):
    """The absmax that bits stand for, and what the block is divided by."""
    absmax = top.to(tl.float32, bitcast=True)
    floor = absmax
    if CPU_RULE:
        absmax = tl.where(top > _INFINITY, float("nan"), absmax)
        floor = tl.where(absmax < _TINY, _TINY, absmax)
    return absmax, floor


@triton.jit
def _nearest(scaled, bins_ptr, CPU_RULE: tl.constexpr):
    """The number of thresholds strictly below, or the code of NaN."""
    zero = tl.zeros_like(scaled)
    place = tl.fma(scaled, zero + 16.0, zero + _SHIFT)
    if not CPU_RULE:  # has no floor: where absmax is denormal, weights may scale to infinity
        place = tl.minimum(place, _SHIFT + 17.0, propagate_nan=tl.PropagateNan.ALL)
    entry = tl.load(bins_ptr + (place.to(tl.int32, bitcast=True) & 63))
    limit = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return entry.to(tl.int32) + (scaled > limit).to(tl.int32)
