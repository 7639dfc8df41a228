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
        collectives, rank = self._collectives, self._collectives.rank
        param = self._params[slots[0].index]
        exchanges = collectives.exchanges(param.device.type)
        others, kind = bucket.world_size - 1, (bucket.section, param.dtype, param.device)
        own = self._buffers.take(others if exchanges else 1, *kind)
        sent = {slot.index for slot in slots}
        for slot in bucket.slots:
            rows = self._params[slot.index].detach() if slot.index in sent else None
            slot.pack(rows, own[:1], rank)
        own[1:].copy_(own[:1].expand_as(own[1:]))
        while self._flying and (self._flying[0].transfer.done() or self._too_much(own)):
            self._land()
        phase = f"all-gather bucket {number}"
        if exchanges:
            sections = self._buffers.take(others, *kind)
            transfer = collectives.all_to_all(sections, own, phase)
        else:
            sections = self._buffers.take(bucket.world_size, *kind)
            transfer = collectives.all_gather(sections, own, phase)
        self._flying.append(_Flying(slots, transfer, own, sections))
        if not self._overlap:
            self._land()

    def finish(self) -> None:
        """Wait for all of them."""
        while self._flying:
            self._land()

    def _too_much(self, own: torch.Tensor) -> bool:
        return own.nbytes + sum(flying.sections.nbytes for flying in self._flying) > self._limit

    def _land(self) -> None:
        flying = self._flying.popleft()
        flying.transfer.wait()
        rank, sections = self._collectives.rank, flying.sections
        with_own = len(sections) == self._collectives.world_size
        for slot in flying.slots:
            param = self._params[slot.index].detach()
            slot.unpack(sections[:rank], param, 0)
            slot.unpack(sections[rank + with_own :], param, rank + 1)
        self._buffers.give(flying.own, sections)
