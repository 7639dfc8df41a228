"""Buffers that buckets are sent from and received into, kept from one step to the next.

A fresh buffer of many megabytes costs a page fault every 4 KiB, as much as filling it.
"""

from __future__ import annotations

import torch


class TransferBuffers:
    """A stock of buffers, [world size, section] each.

    Args:
        limit: bytes of unused buffers that are kept.
    """

    def __init__(self, limit: int) -> None:
        """Begin with none."""
        self._limit, self._kept = limit, 0
        self._free: dict[tuple[object, ...], list[torch.Tensor]] = {}

    def take(
        self, world_size: int, section: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A buffer with anything in it."""
        free = self._free.get((world_size, section, dtype, device))
        if free:
            buffer = free.pop()
            self._kept -= buffer.nbytes
            return buffer
        return torch.empty(world_size, section, dtype=dtype, device=device)

    def give(self, *buffers: torch.Tensor) -> None:
        """Take buffers back that nothing uses any more."""
        for buffer in buffers:
            if self._kept + buffer.nbytes <= self._limit:
                kind = (*buffer.shape, buffer.dtype, buffer.device)
                self._free.setdefault(kind, []).append(buffer)
                self._kept += buffer.nbytes
