"""GradientReducer: sends gradients to the ranks that own their rows, while the backward runs.

```
   hook of a parameter ──> its gradient is packed; the bucket is complete, and it is its turn
                       ──> all-to-all (gloo) or reduce-scatter, under way beside the backward
   end of the backward ──> what is missing is packed as zeros, so that every rank has sent
                           every bucket once, in one order: no rank waits for a bucket that
                           another one does not have
```
Such a pass over all buckets is a round. Gradients of one parameter may come in several rounds: they
add up.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.variable import Variable

from feinwerk import _checks
from feinwerk.optim.buckets import Bucket, Slot
from feinwerk.optim.collectives import Collectives, Transfer
from feinwerk.optim.transfer_buffers import TransferBuffers

_PIECE = 1 << 17  # elements


class _Flying(NamedTuple):
    """A bucket under way."""

    bucket: int
    transfer: Transfer
    sections: torch.Tensor
    received: torch.Tensor
    parts: list[torch.Tensor]  # that add up to the sum, in the order of the ranks


class GradientReducer:
    """Average gradients over ranks, each rank getting its rows.

    Args:
        params: parameters, as the slots of the buckets count them.
        names: of them, for messages.
        buckets: of the kinds (parameter dtype, gradient dtype, device).
        collectives: of the ranks.
        buffers: to send from and receive into.
        keep_gradients: leave `grad` as it is: a later round then sends all of it anew and replaces
            the average (stage 1). Otherwise a gradient is dropped as soon as it is packed, and
            rounds add up (stage 2).
        overlap: let transfers run beside the backward; otherwise each is waited for.
        limit: bytes of buckets under way.

    Attributes:
        used: which parameters had a gradient on this rank since the last `clear`.
        rounds: since the last `clear`.
        stale: there may be gradients that no round has sent.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        buckets: Sequence[Bucket],
        collectives: Collectives,
        buffers: TransferBuffers,
        *,
        keep_gradients: bool,
        overlap: bool,
        limit: int,
    ) -> None:
        """Begin with nothing packed."""
        self._params, self._names, self._buckets = params, names, buckets
        self._collectives, self._buffers = collectives, buffers
        self._keep, self._overlap, self._limit = keep_gradients, overlap, limit
        self._place = {
            slot.index: (i, slot) for i, bucket in enumerate(buckets) for slot in bucket.slots
        }
        self._sections: list[torch.Tensor | None] = [None] * len(buckets)
        self._packed: list[set[int]] = [set() for _ in buckets]
        self._next = 0  # bucket to be launched
        self._open = False  # a round is under way
        self._awaiting_end = False  # of the backward
        self._flying: deque[_Flying] = deque()
        self._shards: list[torch.Tensor | None] = [None] * len(buckets)
        self._has_shard = [False] * len(buckets)
        self._sums: list[list[torch.Tensor]] = [[] for _ in buckets]
        self.used = [False] * len(params)
        self.rounds = 0
        self.stale = True

    @property
    def begun(self) -> bool:
        """Whether gradients have been packed since the last `clear`."""
        return self._open or self.rounds > 0

    @torch.no_grad()
    def ready(self, index: int) -> None:
        """Take the gradient of a parameter, from its hook."""
        bucket = self._place[index][0]
        if self._open and bucket < self._next:
            # It comes again: a second backward, or a shared layer that is recomputed.
            self.end_round()
        self._open = True
        if not self._awaiting_end:
            self._awaiting_end = True
            Variable._execution_engine.queue_callback(self._end_of_backward)
        self._collectives.tell("backward")
        self._pack(index)
        while self._next < len(self._buckets) and len(self._packed[self._next]) == len(
            self._buckets[self._next].slots
        ):
            self._launch()

    def end_round(self) -> None:
        """Launch what has not been launched in this round, with zeros for what did not come."""
        self._open = True
        with torch.no_grad():
            while self._next < len(self._buckets):
                for slot in self._buckets[self._next].slots:
                    if slot.index not in self._packed[self._next]:
                        self._pack(slot.index)
                self._launch()
        self._next, self._open, self.stale = 0, False, False
        self.rounds += 1
        for packed in self._packed:
            packed.clear()

    def finish(self) -> list[bool]:
        """Send what has not been sent; `gradient` has the averages then, until `clear`.

        Returns:
            For each parameter, whether this rank has a gradient of it.
        """
        if self._open or not self.rounds or self.stale:
            self.end_round()
        if self._keep:
            return [param.grad is not None for param in self._params]
        return self.used

    def sums(self, bucket: int) -> list[torch.Tensor]:
        """Sums over parts of the averages of a bucket: finite unless one of them is not."""
        self._shard(bucket)
        return self._sums[bucket]

    def gradient(self, bucket: int, slot: Slot) -> torch.Tensor:
        """The average of this rank's rows of a parameter, fp32; waits for its bucket."""
        return slot.in_section(self._shard(bucket), self._collectives.rank)

    def _shard(self, bucket: int) -> torch.Tensor:
        while any(flying.bucket == bucket for flying in self._flying):
            self._land()
        shard = self._shards[bucket]
        assert shard is not None
        return shard

    def clear(self) -> None:
        """Forget all gradients that have been sent."""
        if self._open:
            self.end_round()
        while self._flying:
            self._land()
        self._has_shard = [False] * len(self._buckets)
        self.used = [False] * len(self._params)
        self.rounds = 0
        self.stale = True

    def _end_of_backward(self) -> None:
        self._awaiting_end = False
        if self._open and not _in_nested_backward():
            self.end_round()

    def _pack(self, index: int) -> None:
        i, slot = self._place[index]
        param, bucket = self._params[index], self._buckets[i]
        grad = param.grad
        sections = self._sections[i]
        if sections is None:
            dtype, device = bucket.kind[1:]  # type: ignore[index]
            sections = self._buffers.take(bucket.world_size, bucket.section, dtype, device)
            self._sections[i] = sections
        if grad is not None and grad.layout is not torch.strided:
            where = f"gradient of {self._names[index]}"
            _checks.reject(NotImplementedError, "ShardedAdamW", where, "be dense", grad.layout)
        if grad is not None:
            self.used[index] = True
        if index in self._packed[i] and not self._keep:
            more = torch.empty_like(sections)
            self._pack_rows(slot, grad, more)
            room = slice(slot.offset, slot.offset + slot.room)
            sections[:, room] += more[:, room]
        else:
            self._pack_rows(slot, grad, sections)
        self._packed[i].add(index)
        if not self._keep:
            param.grad = None

    def _pack_rows(self, slot: Slot, grad: torch.Tensor | None, sections: torch.Tensor) -> None:
        """In the order of the ranks; but this one's, if it is not sent, goes first."""
        rank = self._collectives.rank
        if not self._collectives.exchanges(sections.device.type):
            slot.pack(grad, sections)
            return
        slot.pack(grad, sections[:1], rank)
        slot.pack(grad, sections[1 : rank + 1], 0)
        slot.pack(grad, sections[rank + 1 :], rank + 1)

    def _launch(self) -> None:
        """Send the next bucket."""
        i = self._next
        self._next += 1
        sections = self._sections[i]
        assert sections is not None
        self._sections[i] = None
        # As it goes, so that buffers are free again: what has arrived, and what would be too much.
        while self._flying and (self._flying[0].transfer.done() or self._too_much(sections)):
            self._land()
        phase, collectives = f"reduce-scatter bucket {i}", self._collectives
        (count, section), rank = sections.shape, collectives.rank
        kind = section, sections.dtype, sections.device
        if collectives.exchanges(sections.device.type):
            received = self._buffers.take(count - 1, *kind)
            transfer = collectives.all_to_all(received, sections[1:], phase)
            parts = [*received[:rank], sections[0], *received[rank:]]
        else:
            received = self._buffers.take(1, *kind)
            transfer = collectives.reduce_scatter(received, sections, phase)
            parts = [*received]
        self._flying.append(_Flying(i, transfer, sections, received, parts))
        if not self._overlap:
            self._land()

    def _too_much(self, sections: torch.Tensor) -> bool:
        return sections.nbytes + sum(f.sections.nbytes for f in self._flying) > self._limit

    @torch.no_grad()
    def _land(self) -> None:
        """Wait for the oldest bucket under way, and average it."""
        flying = self._flying.popleft()
        flying.transfer.wait()
        i, parts = flying.bucket, flying.parts
        shard = self._shards[i]
        if shard is None:
            shard = self._shards[i] = torch.empty(
                parts[0].shape, dtype=torch.float32, device=parts[0].device
            )
        adds = self._has_shard[i] and not self._keep
        self._sums[i] = _average(parts, shard, self._collectives.world_size, adds)
        self._has_shard[i] = True
        self._buffers.give(flying.sections, flying.received)


def _average(
    parts: list[torch.Tensor], shard: torch.Tensor, count: int, adds: bool
) -> list[torch.Tensor]:
    """Write, or add, the sum of the parts in their order, in fp32, divided by a count.

    In pieces that stay in the cache from one operation to the next, where there is one.

    Returns:
        The sums of the pieces of the shard.
    """
    sums = []
    length = shard.numel()
    piece = _PIECE if shard.device.type == "cpu" else max(1, length)
    fp32 = len(parts) > 1 and parts[0].dtype is torch.float32
    scratch = torch.empty(min(piece, length), dtype=torch.float32, device=shard.device)
    for begin in range(0, length, piece):
        some = [part[begin : begin + piece] for part in parts]
        target = shard[begin : begin + piece]
        out = scratch[: len(target)] if adds else target
        if fp32:
            torch.add(some[0], some[1], out=out)
        else:
            out.copy_(some[0])
        for part in some[1 + fp32 :]:
            out.add_(part)
        out.div_(count)
        if adds:
            target.add_(out)
        sums.append(target.sum())
    return sums


def _in_nested_backward() -> bool:
    """Whether the backward that has just ended runs within another one.

    So it is under reentrant activation checkpointing, where a layer's backward runs one of its own:
    gradients of other layers are still to come. An answer that is wrong costs a round or overlap,
    never a gradient. Threads of the engine's own have only nested ones on their Python stack.
    """
    run = torch.autograd.graph._engine_run_backward.__code__
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth += frame.f_code is run
        frame = frame.f_back  # type: ignore[assignment]
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return depth > (0 if foreign else 1)
