"""ParameterGatherer: gives every rank the rows that the others have stepped, bucket by bucket."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from feinwerk.optim.buckets import Bucket, Slot
from feinwerk.optim.collectives import Collectives, Transfer
from feinwerk.optim.transfer_buffers import TransferBuffers


class _Flying(NamedTuple):
    """A bucket under way."""

    slots: list[Slot]
    transfer: Transfer
    own: torch.Tensor
    sections: torch.Tensor


class ParameterGatherer:
    """Gather buckets while the next ones are stepped.

    Args:
        params: parameters, as the slots of the buckets count them.
        collectives: of the ranks.
        buffers: to send from and receive into.
        overlap: let transfers run beside the next step; otherwise each is waited for.
        limit: bytes of buckets under way.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        collectives: Collectives,
        buffers: TransferBuffers,
        *,
        overlap: bool,
        limit: int,
    ) -> None:
        """Begin with nothing under way."""
        self._params, self._collectives, self._buffers = params, collectives, buffers
        self._overlap, self._limit = overlap, limit
        self._flying: deque[_Flying] = deque()

    def launch(self, number: int, bucket: Bucket, slots: list[Slot]) -> None:
        """Send this rank's rows of some slots of a bucket, the same slots on every rank."""
        rank = self._collectives.rank
        param = self._params[slots[0].index]
        kind = bucket.section, param.dtype, param.device
        own = self._buffers.take(1, *kind)
        for slot in bucket.slots:
            if slot not in slots:
                own[0, slot.offset : slot.offset + slot.room].zero_()
                continue
            rows = slot.rows_of(self._params[slot.index].detach(), rank)
            slot.in_section(own[0], rank).copy_(rows)
            # Not whatever was in the buffer: every rank is to send the same bytes in every run.
            own[0, slot.offset + rows.numel() : slot.offset + slot.room].zero_()
        while self._flying and (self._flying[0].transfer.done() or self._too_much(bucket, param)):
            self._land()
        sections = self._buffers.take(bucket.world_size, *kind)
        transfer = self._collectives.all_gather(sections, own, f"all-gather bucket {number}")
        self._flying.append(_Flying(slots, transfer, own, sections))
        if not self._overlap:
            self._land()

    def finish(self) -> None:
        """Wait for all of them."""
        while self._flying:
            self._land()

    def _too_much(self, bucket: Bucket, param: torch.Tensor) -> bool:
        size = bucket.world_size * bucket.section * param.element_size()
        return size + sum(flying.sections.nbytes for flying in self._flying) > self._limit

    def _land(self) -> None:
        flying = self._flying.popleft()
        flying.transfer.wait()
        for slot in flying.slots:
            slot.unpack(flying.sections, self._params[slot.index].detach())
        self._buffers.give(flying.own, flying.sections)
