"""Collectives with a name and a limit of time each, whose failures are typed and name the peer.

torch's own errors say that a connection was reset or that an operation timed out. Here every
transfer belongs to a phase such as "all-gather bucket 2"; what goes wrong in it is raised as
`PeerFailure` or `PhaseTimeout` with the phase and, by the heartbeat, the ranks that are gone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from feinwerk.optim.errors import PeerFailure, PhaseTimeout, ShardingError
from feinwerk.optim.heartbeat import Beats, Heartbeat, silent

_SLICE = 0.5  # seconds of waiting in one piece: an interrupt is seen in between
_CONNECTION = re.compile("connection|peer|closed|closure|socket|pipe|timed out", re.IGNORECASE)
_SLICE_IS_OVER = "Operation timed out"  # of the wait; the transfer's own is "Timed out waiting"
_heartbeats = 0  # of this process, so that each has keys of its own
_on_reached: Callable[[str], None] | None = None


def on_reached(callback: Callable[[str], None] | None) -> None:
    """Have every later `reached` call a function; for tests of faults. None: no more."""
    global _on_reached
    _on_reached = callback


def reached(point: str) -> None:
    """Mark a named point of the program, such as "in step"."""
    if _on_reached is not None:
        _on_reached(point)


class Transfer:
    """A collective under way. The tensors it uses are kept until it is done."""

    def __init__(
        self, collectives: Collectives, phase: str, work: Any, tensors: tuple[torch.Tensor, ...]
    ) -> None:
        """Take what `Collectives` started."""
        self._collectives, self._work, self.phase = collectives, work, phase
        self._tensors = tensors

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait for the end of it.

        Raises:
            PeerFailure: if a peer died.
            PhaseTimeout: if it did not end in time.
        """
        self._collectives._wait(self.phase, self._work, self._tensors[0].device.type)


class Collectives:
    """The collectives of one process group.

    Args:
        group: of any backend.
        timeout: seconds a phase; may be changed at any time.

    Attributes:
        rank: in the group.
        world_size: of the group.
        ranks: global ranks of the group.
        failure: what the first failed transfer raised; every later one raises it again, because
            the connections are not usable after it.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        """Take a group; nothing is sent."""
        self.group, self.timeout = group, timeout
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.failure: ShardingError | None = None
        self.heartbeat: Heartbeat | None = None
        backends = dict(
            pair.split(":", 1) for pair in str(dist.get_backend_config(group)).split(",")
        )
        self._backends = backends
        # Where the small tensors live that are read at once.
        self.control_device = torch.device("cpu" if "cpu" in backends else next(iter(backends)))

    def backend(self, device_type: str) -> str:
        """The name of the backend for tensors of a device, such as "gloo"."""
        return self._backends.get(device_type, "")

    def start_heartbeat(self) -> None:
        """Show signs of life from here on; collective. A group without a store has none."""
        global _heartbeats
        mine = torch.tensor([_heartbeats])
        number = int(self.all_reduce(mine, dist.ReduceOp.MAX, "start the heartbeat"))
        _heartbeats = number + 1
        try:
            store = dist.distributed_c10d._get_default_store()
        except (RuntimeError, ValueError):
            return
        interval = min(1.0, max(0.05, self.timeout / 20))
        me = self.ranks[self.rank]
        prefix = f"feinwerk/heartbeat/{self.ranks[0]}/{number}"
        self.heartbeat = Heartbeat(store, prefix, self.ranks, me, interval)

    def close(self) -> None:
        """End the heartbeat."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None

    def tell(self, phase: str) -> None:
        """Let the others know what this rank is doing, should they ask."""
        if self.heartbeat is not None:
            self.heartbeat.tell(phase)

    def exchanges(self, device_type: str) -> bool:
        """Whether data goes by `all_to_all` alone.

        Gloo's reduce-scatter moves as much as an all-reduce, twice what is needed, and its
        all-gather copies all of it once more.
        """
        return self.backend(device_type) == "gloo"

    def all_to_all(self, output: torch.Tensor, given: torch.Tensor, phase: str) -> Transfer:
        """Send one row of `given` to each other rank, in their order, and receive one of each.

        Args:
            output: [world size - 1, n].
            given: likewise.
            phase: for messages.
        """
        splits = [int(rank != self.rank) for rank in range(self.world_size)]
        options = "AllToAllOptions"
        return self._start(phase, (output, given), "alltoall_base", options, splits, splits)

    def reduce_scatter(self, output: torch.Tensor, given: torch.Tensor, phase: str) -> Transfer:
        """Sum the rank-th row of `given` over all ranks, in the backend's order."""
        options = "ReduceScatterOptions"
        return self._start(phase, (output, given), "_reduce_scatter_base", options)

    def all_gather(self, output: torch.Tensor, given: torch.Tensor, phase: str) -> Transfer:
        """Collect `given` of rank i as `output[i]`."""
        return self._start(phase, (output, given), "_allgather_base", "AllgatherOptions")

    def all_reduce(self, values: torch.Tensor, op: Any, phase: str) -> torch.Tensor:
        """Return the sum or maximum of small tensors over all ranks, on the CPU."""
        given = values.to(self.control_device, copy=True)
        self._start(phase, ([given],), "allreduce", "AllreduceOptions", reduceOp=op).wait()
        return given.cpu()

    def exchange(self, text: str, phase: str) -> list[str]:
        """Return what every rank gave, by rank in the group."""
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        size = torch.tensor([data.numel() if text else 0], dtype=torch.int64)
        sizes = self._gathered(size, phase).reshape(-1).tolist()
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: data.numel()] = data[: padded.numel()]
        rows = self._gathered(padded, phase)
        pairs = zip(rows, sizes, strict=True)
        return [bytes(row[:size].tolist()).decode() for row, size in pairs]

    def _gathered(self, given: torch.Tensor, phase: str) -> torch.Tensor:
        given = given.to(self.control_device).reshape(1, -1)
        output = torch.empty(self.world_size, given.numel(), dtype=given.dtype, device=given.device)
        self.all_gather(output, given, phase).wait()
        return output.cpu()

    def _start(
        self,
        phase: str,
        tensors: tuple[Any, ...],
        method: str,
        options: str,
        *more: Any,
        **choices: Any,
    ) -> Transfer:
        # torch's public functions have no time limit for one transfer. A torch without
        # torch.distributed has no such module.
        from torch._C import _distributed_c10d

        self.check()
        flat = tensors[0] if isinstance(tensors[0], list) else list(tensors)
        made = getattr(_distributed_c10d, options)()
        for name, value in choices.items():
            setattr(made, name, value)
        if self.backend(flat[0].device.type) == "gloo":
            # Not the group's own 30 minutes: a thread blocked in a transfer keeps the program from
            # ending. A little more than the wait's, so that the wait has the word.
            made.timeout = timedelta(seconds=1.1 * self.timeout + 1)
        begin = time.monotonic()
        try:
            work = getattr(self.group, method)(*tensors, *more, made)
        except RuntimeError as error:
            if not _CONNECTION.search(str(error)):
                raise  # refused by torch on this rank: no peer is at fault
            raise self._failed(phase, error, begin, None) from error
        return Transfer(self, phase, work, tuple(flat))

    def check(self) -> None:
        """Raise what has been raised before."""
        if self.failure is not None:
            raise self.failure

    def _wait(self, phase: str, work: Any, device_type: str) -> None:
        self.check()
        self.tell(phase)
        begin = time.monotonic()
        before: Beats | None = None
        try:
            if self.backend(device_type) != "gloo":
                self._wait_on_stream(work, device_type, begin)
                return
            while True:
                waited = time.monotonic() - begin
                if waited >= self.timeout:
                    raise self._failed(phase, None, begin, before)
                if before is None and 2 * waited >= self.timeout and self.heartbeat is not None:
                    before = self.heartbeat.look() or {}
                if _ends(work, max(0.001, min(_SLICE, self.timeout - waited))):
                    return
        except ShardingError:
            raise
        except RuntimeError as error:
            raise self._failed(phase, error, begin, before) from error

    def _wait_on_stream(self, work: Any, device_type: str, begin: float) -> None:
        """Of a GPU's backend: order the stream behind it; the CPU waits for control tensors only.

        A transfer of a bucket that never ends is found by the next control tensor, which is queued
        behind it.
        """
        if device_type == self.control_device.type:
            while not work.is_completed():
                if time.monotonic() - begin >= self.timeout:
                    raise RuntimeError("timed out")
                time.sleep(0.0002)
        work.wait()

    def _failed(
        self, phase: str, error: RuntimeError | None, begin: float, before: Beats | None
    ) -> ShardingError:
        """The typed error, kept for all later transfers."""
        seconds = time.monotonic() - begin
        peers: tuple[int, ...] = ()
        if self.heartbeat is not None:
            self.heartbeat.tell(phase, failed=True)
            if not before:
                before = self.heartbeat.look()
                # Longer than a living rank needs to be heard on a busy machine.
                time.sleep(max(1.0, 2.5 * self.heartbeat.interval))
            after = self.heartbeat.look()
            peers = silent(before, after)
        text = str(error or "timed out").split("\n", 1)[0]
        if error is None or "timed out" in text.lower() or "timeout" in text.lower():
            self.failure = PhaseTimeout(phase, peers, round(seconds, 3))
        else:
            self.failure = PeerFailure(phase, peers, _essence(text))
        return self.failure


def _ends(work: Any, seconds: float) -> bool:
    """Whether a transfer ends within some time; a transfer that failed raises.

    Not by is_completed: some of gloo's never say so, and others come to it a moment too late.
    """
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        if _SLICE_IS_OVER in str(error):
            return False
        raise
    return True


def _essence(text: str) -> str:
    """What a transport's message says, without its source file and its advice."""
    without_file = re.sub(r"^\[[^]]*\] ", "", text)
    return re.split(r"\. (?=[A-Z])", without_file, maxsplit=1)[0]
