"""8-bit codes of the moments for every target: look-ups by gather, the nearest code by arithmetic.

```
   dynamic map      decade d is cut into n 2^d equal cells: code(x) is piecewise linear, and concave
   line d           A_d x + B_d, through the codes of decade d
   code(x)          the least of the seven lines, then one look at the true midpoint above it
```
The lines are 1 below the code at the lower edge of its cell. A value is nearer to another code than
its cell's only between an edge of two decades and the midpoint beyond it, a fifth of a cell. So
rounding the least line gives the code or the one below, with a quarter of a cell to spare, and
comparing with the midpoint between the two decides: exactly, ties to the lower.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from feinwerk.codebook import dynamic_map
from feinwerk.ops.adamw_step import triton_ptx as ptx

_LOW = 0.1  # decades begin there: [0.1, 1] * 10^e, e = -6 .. 0
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # adding it rounds to an integer, in the lowest bits


def _lines(cells: int) -> list[tuple[float, float]]:
    """Slope and offset for every decade, whose lowest one has so many cells."""
    found = []
    for decade in range(7):
        n = cells << decade
        slope = n / (1 - _LOW) * 10.0 ** (6 - decade)
        # The codes below this decade: one for zero, and those of the lower decades.
        first = 1 + cells * ((1 << decade) - 1)
        found.append((slope, first - 1 - n * _LOW / (1 - _LOW)))
    return found


_A0, _A1, _A2, _A3, _A4, _A5, _A6 = (tl.constexpr(a) for a, _ in _lines(1))
_B0, _B1, _B2, _B3, _B4, _B5, _B6 = (tl.constexpr(b) for _, b in _lines(1))
# Unsigned: two cells in the lowest decade.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (tl.constexpr(a) for a, _ in _lines(2))
_D0, _D1, _D2, _D3, _D4, _D5, _D6 = (tl.constexpr(b) for _, b in _lines(2))


@functools.cache
def tables_on(device: torch.device) -> torch.Tensor:
    """Return what the kernels look up: fp32 [4, 256] on a device, made once.

    Rows: the signed map, the unsigned map, and for each the midpoints; those of the signed map come
    behind minus infinity, as nothing is below code 0.
    """
    signed, unsigned = (dynamic_map(kind, "cpu") for kind in (True, False))
    middle, middle_sq = ((values[:-1] + values[1:]) * 0.5 for values in (signed, unsigned))
    end = torch.full((1,), torch.inf, dtype=torch.float32, device="cpu")
    rows = [signed, unsigned, torch.cat([-end, middle]), torch.cat([middle_sq, end])]
    return torch.stack(rows).to(device)


@triton.jit
def look_up(table, index):
    """table[index], of a table of 256 and any shape of indices: through shared memory."""
    return tl.reshape(tl.gather(table, tl.ravel(index), 0), index.shape)


@triton.jit
def signed_codes(x, midpoints):
    """The signed map's nearest code, ties to the lower, of fp32 in [-1, 1]; NaN counts as zero.

    A negative number's code mirrors that of its magnitude: 127 + base becomes 127 + ~base.
    """
    x = tl.where(x == x, x, 0.0)
    a = tl.abs(x)
    line = tl.minimum(tl.fma(a, _A0, _B0), tl.fma(a, _A1, _B1))
    line = tl.minimum(line, tl.fma(a, _A2, _B2))
    line = tl.minimum(line, tl.fma(a, _A3, _B3))
    line = tl.minimum(line, tl.fma(a, _A4, _B4))
    line = tl.minimum(line, tl.fma(a, _A5, _B5))
    line = tl.minimum(line, tl.fma(a, _A6, _B6))
    base = (line + _MAGIC).to(tl.int32, bitcast=True) & 0xFF
    base = base ^ (x.to(tl.int32, bitcast=True) >> 31)
    return base + 127 + (x > look_up(midpoints, base + 128)).to(tl.int32)


@triton.jit
def unsigned_codes(x, midpoints):
    """The unsigned map's nearest code, ties to the lower, of fp32 up to 1; NaN counts as zero."""
    a = tl.maximum(x, 0.0)
    line = tl.minimum(tl.fma(a, _C0, _D0), tl.fma(a, _C1, _D1))
    line = tl.minimum(line, tl.fma(a, _C2, _D2))
    line = tl.minimum(line, tl.fma(a, _C3, _D3))
    line = tl.minimum(line, tl.fma(a, _C4, _D4))
    line = tl.minimum(line, tl.fma(a, _C5, _D5))
    line = tl.minimum(line, tl.fma(a, _C6, _D6))
    base = (line + _MAGIC).to(tl.int32, bitcast=True) & 0xFF
    return base + (a > look_up(midpoints, base)).to(tl.int32)


@triton.jit
def _reciprocal(most, PTX: tl.constexpr):
    """1 / most; zero below the smallest normal number, where it would overflow."""
    usable = most >= _SMALLEST_NORMAL
    inverse = ptx.reciprocal(most) if PTX else tl.div_rn(1.0, tl.where(usable, most, 1.0))
    return tl.where(usable, inverse, 0.0)


@triton.jit
def fresh(most, most_sq, PTX: tl.constexpr):
    """Maxima of a block's magnitudes, or zeros where one has overflowed; and their reciprocals."""
    finite = (most < float("inf")) & (most_sq < float("inf"))
    most, most_sq = tl.where(finite, most, 0.0), tl.where(finite, most_sq, 0.0)
    return most, most_sq, _reciprocal(most, PTX), _reciprocal(most_sq, PTX)
