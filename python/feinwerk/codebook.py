"""The tables of the formats: NF4's 16 values and thresholds, and the 8-bit dynamic maps.

The only Python copy of these numbers. `docs/format.md` gives their origin.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
RULES = ("cpu", "cuda")

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# fp32 bits of the boundary between code t and t + 1; a value on the boundary takes code t.
# The CPU rule's are the fp32 midpoints of NF4_VALUES, CUDA's are rounded decimal literals.
_NF4_THRESHOLD_BITS = {
    "cpu": "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da",
    "cuda": "bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64863 3e5067e0 3e9582d4 3ec753f9 3f006d03 3f248daf 3f5c89d9",
}
NF4_THRESHOLDS = {
    rule: tuple(float(np.uint32(int(bits, 16)).view(np.float32)) for bits in text.split())
    for rule, text in _NF4_THRESHOLD_BITS.items()
}


def nf4_codebook(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 16 NF4 values, ascending, as an fp32 tensor.

    Args:
        device: where the tensor lives.

    Returns:
        fp32 [16].

    Source:
        QLoRA (arXiv 2305.14314), appendix E; the digits are bitsandbytes'.

    Example:
        >>> nf4_codebook()[7]
        tensor(0.)
    """
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def nf4_thresholds(rule: str = "cpu", device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 15 decision thresholds of one quantizer rule, ascending.

    Args:
        rule: "cpu" or "cuda".
        device: where the tensor lives.

    Returns:
        fp32 [15]; a scaled weight s takes code = number of thresholds strictly below s.

    Raises:
        KeyError: if `rule` is neither.

    Source:
        bitsandbytes 0.50.2, its CPU midpoints and its CUDA literals.

    Example:
        >>> nf4_thresholds("cpu").numel()
        15
    """
    return torch.tensor(NF4_THRESHOLDS[rule], dtype=torch.float32, device=device)


def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 8-bit dynamic map: 256 ascending values in [-1, 1].

    Each decade [0.1, 1] * 10**e, e = -6 .. 0, is cut into 2**(e + 6) equal cells (twice as many
    when unsigned) and contributes the cell centres, with both signs when signed; 0 and 1 complete
    the map. A checkpoint stores the map it was written with: readers use that one.

    Args:
        signed: with negative values.
        device: where the tensor lives.

    Returns:
        fp32 [256], bit-equal on every machine.

    Source:
        8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561), as built by
        bitsandbytes' create_dynamic_map on a CPU with fused multiply-add.

    Example:
        >>> dynamic_map()[-1]
        tensor(1.)
    """
    return torch.from_numpy(_dynamic_map(signed).copy()).to(device)


@functools.cache
def _dynamic_map(signed: bool) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    low, high = float(np.float32(0.1)), 1.0
    values = [np.float32(0.0), np.float32(1.0)]
    for exponent in range(-6, 1):
        cells = 2 ** (exponent + (6 if signed else 7))
        step = float(np.float32((np.float32(high) - np.float32(low)) / np.float32(cells)))
        # Edges are counted from the nearer end, each with one rounding, as torch.linspace does;
        # products of fp32 numbers and small integers are exact in double.
        edges = np.array(
            [
                low + step * i if 2 * i < cells + 1 else high - step * (cells - i)
                for i in range(cells + 1)
            ],
            dtype=np.float32,
        )
        centres = (edges[:-1] + edges[1:]) / np.float32(2.0) * np.float32(10.0**exponent)
        values.extend(centres)
        if signed:
            values.extend(-centres)
    return np.sort(np.array(values, dtype=np.float32))
