"""The ordered mean in Triton: the reference's cascade of additions, one launch a level.

```
   rows of 32 numbers   r0 r1 r2 ... r15 | r16 ...        `step` rows one after the other
   level 1                    s0         |  s1  ...       make one row of the next level: groups
   level 2, level 3           ...                         run side by side, lanes never mix
```
What a level leaves over stays on it. One last program adds the leftovers, the lanes and the tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from feinwerk.triton_lib import gpu_of, launch

_UNROLL = tl.constexpr(16)  # rows loaded together; the smallest step


def ordered_mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of a contiguous vector, to the bit in the reference's order."""
    count = x.numel()
    lanes = 8 if count >= 8 else 1
    width = 4 * lanes
    rows = count // lanes // 4
    step = 1 << max(4, (max(rows, 1) - 1).bit_length() // 4)
    groups = [rows // step, rows // step**2, rows // step**3]
    sums = torch.empty((max(sum(groups), 1), width), dtype=torch.float32, device=x.device)
    together = 256 if gpu_of(x.device).backend == "interpreter" else 16
    source = x
    for level, made in enumerate(groups):
        target = sums[sum(groups[:level]) :]
        launch(
            ordered_sum_fwd_kernel, (-(-made // together),),
            target, source, made, step, WIDTH=width, GROUPS=together, num_warps=4,
        )  # fmt: skip
        source = target
    mean = torch.empty((), dtype=torch.float32, device=x.device)
    launch(
        ordered_mean_fwd_kernel, (1,),
        mean, x, sums, count, rows, *groups, step, LANES=lanes, num_warps=1,
    )  # fmt: skip
    return mean


@triton.jit(do_not_specialize=["made", "step"])
def ordered_sum_fwd_kernel(
    out_ptr, rows_ptr, made, step, WIDTH: tl.constexpr, GROUPS: tl.constexpr
):
    """Add `step` rows, one after the other, for each of GROUPS rows of the next level."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([GROUPS, WIDTH], tl.float32)
    source = rows_ptr + group * step * WIDTH + lane
    for row in range(0, step, _UNROLL):
        for i in tl.static_range(_UNROLL):
            total += tl.load(source + (row + i) * WIDTH, mask=group < made, other=0.0)
    tl.store(out_ptr + group * WIDTH + lane, total, mask=group < made)


@triton.jit(do_not_specialize=["count", "rows", "made1", "made2", "made3", "step"])
def ordered_mean_fwd_kernel(
    mean_ptr, x_ptr, sums_ptr, count, rows, made1, made2, made3, step, LANES: tl.constexpr
):
    """Add what each level leaves over, then the four vectors of a row, the lanes and the tail."""
    count = tl.cast(count, tl.int64)
    made1 = tl.cast(made1, tl.int64)
    made2 = tl.cast(made2, tl.int64)
    at = (tl.arange(0, 4)[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    level2 = sums_ptr + made1 * 4 * LANES
    level3 = level2 + made2 * 4 * LANES
    total = _chain(x_ptr, made1 * step, rows, at, 4 * LANES)
    total += _chain(sums_ptr, made2 * step, made1, at, 4 * LANES)
    total += _chain(level2, made3 * step, made2, at, 4 * LANES)
    total += _chain(level3, 0, made3, at, 4 * LANES)
    which = tl.arange(0, 4)[:, None]
    lane = tl.arange(0, LANES)
    # A sum over one vector and zeros picks it out.
    sums = tl.sum(tl.where(which == 0, total, 0.0), 0)
    first = tl.cast(rows, tl.int64) * 4
    for i in tl.static_range(3):
        vector = (first + i) * LANES + lane
        sums += tl.load(x_ptr + vector, mask=vector < count // LANES * LANES, other=0.0)
    for i in tl.static_range(1, 4):
        sums += tl.sum(tl.where(which == i, total, 0.0), 0)
    result = 0.0
    tail = count // LANES * LANES
    for i in tl.static_range(LANES - 1):
        result += tl.load(x_ptr + tail + i, mask=tail + i < count, other=0.0)
    for i in tl.static_range(LANES):
        result += tl.sum(tl.where(lane == i, sums, 0.0), 0)
    tl.store(mean_ptr, tl.div_rn(result, count.to(tl.float32)))


@triton.jit
def _chain(rows_ptr, first, end, at, WIDTH: tl.constexpr):
    """Rows first to end, one after the other from zero; a zero past the end changes no sum."""
    total = tl.zeros(at.shape, tl.float32)
    stop = tl.cast(end, tl.int64) * WIDTH
    for row in range(tl.cast(first, tl.int64), end, _UNROLL):
        for i in tl.static_range(_UNROLL):
            number = at + (row + i) * WIDTH
            total += tl.load(rows_ptr + number, mask=number < stop, other=0.0)
    return total
