"""What fits into a device: the largest batch and sequence, and which choices make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from feinwerk.plan.settings import STAGES, Settings

# More is no question of memory.
LARGEST = 1 << 20


@dataclass(frozen=True)
class Option:
    """Other choices for the same work, and what they need."""

    stage: int
    state_bits: int
    checkpointing: bool
    peak: int
    fits: bool


@dataclass(frozen=True)
class Fit:
    """How a plan stands with the memory of a device.

    Attributes:
        memory: bytes of the device.
        reserve: of it, not for tensors.
        fits: whether the peak is at most what is left.
        spare: what is left beside the peak, negative if it does not fit.
        batch: the largest batch that fits with the plan's sequence; 0 if none does.
        seq: the longest sequence that fits with the plan's batch; 0 if none does.
        options: stage, state bits and checkpointing in all combinations.
    """

    memory: int
    reserve: int
    fits: bool
    spare: int
    batch: int
    seq: int
    options: tuple[Option, ...]


def find_fit(settings: Settings, memory: int, reserve: int, peak: Callable[[Settings], int]) -> Fit:
    """Return how settings fit.

    Args:
        settings: that were asked for.
        memory: bytes of a device.
        reserve: of it, not for tensors.
        peak: of any settings.
    """
    room = memory - reserve
    mine = peak(settings)

    def fits(**sizes: Any) -> bool:
        return peak(dataclasses.replace(settings, **sizes)) <= room

    options = []
    for stage in STAGES if settings.world_size > 1 else (0,):
        for bits in (32, 8):
            for checkpointing in (False, True):
                need = peak(
                    dataclasses.replace(
                        settings, stage=stage, state_bits=bits, checkpointing=checkpointing
                    )
                )
                options.append(Option(stage, bits, checkpointing, need, need <= room))
    return Fit(
        memory, reserve, mine <= room, room - mine, _largest(lambda n: fits(batch=n)),
        _largest(lambda n: fits(seq=n)),
        tuple(options),
    )  # fmt: skip


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest value up to LARGEST for which it fits, or 0; what fits does so below, too."""
    if not fits(1):
        return 0
    low = 1
    while low < LARGEST and fits(2 * low):
        low *= 2
    if low >= LARGEST:
        return LARGEST
    high = 2 * low  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
