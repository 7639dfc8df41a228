"""A hash of a tensor's bytes that any device computes, for ranks to compare what they hold."""

from __future__ import annotations

import torch

_SLAB = 1 << 20  # bytes at a time, 8 times that in workspace


@torch.no_grad()
def hash_bytes(tensor: torch.Tensor) -> int:
    """A 64-bit hash of a tensor's bytes, computed where it lives, in slabs.

    Every 4 bytes are mixed with their position, and the results summed modulo 2^64: the order of
    the sum does not matter, and a change of any one word always shows.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = flat.numel()
    for begin in range(0, flat.numel(), _SLAB):
        slab = flat[begin : begin + _SLAB]
        if slab.numel() % 4:
            slab = torch.cat([slab, slab.new_zeros(-slab.numel() % 4)])
        if slab.storage_offset() % 4:
            slab = slab.clone()
        words = slab.view(torch.int32).long()
        position = torch.arange(
            begin // 4, begin // 4 + words.numel(), dtype=torch.int64, device=words.device
        )
        total += int(_mix(words ^ _mix(position * _STRIDE)).sum())
    return total % (1 << 64)


# splitmix64's constants, as the signed numbers that int64 has them as.
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer, a bijection of 64-bit words."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: int64's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
