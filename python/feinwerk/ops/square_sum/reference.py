"""What square_sum means, in plain torch: rows in one order, then integers, which have none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Squares of fp32 numbers are multiples of 2^-298 and below 2^256: 20 limbs reach from 2^-300 to
# 2^300. A limb counts up to 2^30 a row, so that 2^33 rows fit its 63 bits.
LIMB_BITS = 30
LOWEST = -300
LIMBS = 20
# Two counters follow the limbs: rows with an infinity and rows with a NaN.
LENGTH = LIMBS + 2

_LANES, _BLOCK = 16, 1024
_SLAB = 1 << 17  # elements at a time; so many integers below 2^30 have an exact sum in fp64


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the squares of every row in fp64, and the rows exactly."""
    device = tensors[0].device if tensors else torch.device("cpu")
    limbs = torch.zeros(LENGTH, dtype=torch.int64, device=device)
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        rows = tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else tensor.numel(), -1)
        each = max(1, _SLAB // rows.shape[1])
        for first in range(0, rows.shape[0], each):
            limbs += _exact_sum(_row_sums(rows[first : first + each]))
    return limbs


def _row_sums(rows: torch.Tensor) -> torch.Tensor:
    """Add up a row: 16 lanes in turn through a block of 1024, the lanes folded, then the blocks."""
    squares = rows.double()
    squares = squares * squares
    padded = F.pad(squares, (0, -squares.shape[1] % _LANES))
    # Fewer steps where a row is shorter than a block: adding zeros changes nothing.
    padded = F.pad(padded, (0, -padded.shape[1] % min(_BLOCK, padded.shape[1])))
    blocks = padded.view(rows.shape[0], -1, min(_BLOCK, padded.shape[1]) // _LANES, _LANES)
    lanes = blocks[:, :, 0]
    for i in range(1, blocks.shape[2]):
        lanes = lanes + blocks[:, :, i]
    while lanes.shape[2] > 1:
        lanes = lanes[..., : lanes.shape[2] // 2] + lanes[..., lanes.shape[2] // 2 :]
    total = lanes[:, 0, 0]
    for i in range(1, lanes.shape[1]):
        total = total + lanes[:, i, 0]
    return total


def _exact_sum(values: torch.Tensor) -> torch.Tensor:
    limbs = torch.zeros(LENGTH, dtype=torch.int64, device=values.device)
    limbs[LIMBS], limbs[LIMBS + 1] = values.isposinf().sum(), values.isnan().sum()
    rest = torch.where(values.isfinite(), values, 0.0)
    most = float(rest.amax())
    # most < 2^exponent; with it the highest limb that is not zero is known.
    exponent = math.frexp(most)[1] if most > 0 else LOWEST
    limb = max(0, exponent - 1 - LOWEST) // LIMB_BITS
    rest = rest * 2.0 ** -(LOWEST + LIMB_BITS * limb)
    while limb >= 0 and float(rest.amax()) > 0:
        whole = rest.floor()
        limbs[limb] = whole.sum().to(torch.int64)
        rest = (rest - whole) * 2.0**LIMB_BITS
        limb -= 1
    return limbs
