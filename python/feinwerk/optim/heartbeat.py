"""A sign of life of every rank in the group's store, so that survivors can say who is gone.

A transport says that a connection broke or that time ran out, not which rank is at fault. So each
rank writes a number that grows, and what it is doing. Whoever is in trouble reads all of them
twice: a rank whose number stood still in between is dead, stopped, or cut off.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_ANSWER = 5.0  # seconds that a look may take: the store may be gone as well
_JOIN = 1.0  # seconds that the end of the program waits for the thread


class Beat(NamedTuple):
    """What a rank wrote last."""

    number: int
    failed: bool  # it has raised an error itself, and may leave without being the cause
    phase: str


Beats = dict[int, Beat]


@dataclass
class _Shared:
    """What the thread sees; not the Heartbeat itself, which could never be collected then."""

    store: Any
    prefix: str
    ranks: tuple[int, ...]
    rank: int
    interval: float
    phase: str = ""
    failed: bool = False
    stopping: bool = False
    dead: bool = False
    wake: threading.Condition = field(default_factory=threading.Condition)
    asked: int = 0
    answered: int = 0
    beats: Beats | None = None

    def key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"


class Heartbeat:
    """Write this rank's sign of life every `interval` seconds, in a thread, and read the others'.

    The thread ends with this object, and with the program: it keeps nothing alive.

    Args:
        store: a torch.distributed.Store that all ranks share; this object uses a clone if it can.
        prefix: of the keys, the same on all ranks and used by nobody else.
        ranks: global ranks of the group.
        rank: this one, a global rank.
        interval: seconds.
    """

    def __init__(
        self, store: Any, prefix: str, ranks: Sequence[int], rank: int, interval: float
    ) -> None:
        """Start the thread."""
        # A connection of its own: another thread may be blocked in the original for minutes.
        own = store.clone() if hasattr(store, "clone") else store
        self.interval = interval
        self._shared = _Shared(own, prefix, tuple(ranks), rank, interval)
        thread = threading.Thread(
            target=_beat, args=(self._shared,), name="feinwerk-heartbeat", daemon=True
        )
        # At exit as well, before the interpreter is taken down under a thread that uses it.
        self._stop = weakref.finalize(self, _stop, self._shared, thread)
        thread.start()

    def tell(self, phase: str, failed: bool = False) -> None:
        """Say from the next beat on what this rank is doing, or that it has failed."""
        self._shared.phase = phase
        if failed:
            self._shared.failed = True
            with self._shared.wake:
                self._shared.wake.notify_all()

    def look(self) -> Beats | None:
        """What every rank wrote last, by global rank; None if the store does not answer."""
        shared = self._shared
        with shared.wake:
            shared.asked += 1
            mine = shared.asked
            shared.wake.notify_all()
            shared.wake.wait_for(lambda: shared.answered >= mine or shared.dead, _ANSWER)
            return shared.beats if shared.answered >= mine else None

    def stop(self) -> None:
        """End the thread."""
        self._stop()


def silent(before: Beats | None, after: Beats | None) -> tuple[int, ...]:
    """The ranks that did not beat between two looks and have not failed themselves.

    Example:
        >>> before = {0: Beat(5, False, "step"), 1: Beat(7, False, "agree")}
        >>> silent(before, {0: Beat(6, False, "step"), 1: Beat(7, False, "agree")})
        (1,)
    """
    if before is None or after is None:
        return ()
    return tuple(
        rank
        for rank in sorted(before)
        if rank in after and after[rank].number == before[rank].number and not after[rank].failed
    )


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    with shared.wake:
        shared.stopping = True
        shared.wake.notify_all()
    if thread is not threading.current_thread():
        thread.join(_JOIN)


def _beat(shared: _Shared) -> None:
    """What the thread does."""
    count = 0
    try:
        while True:
            count += 1
            value = f"{count} {int(shared.failed)} {shared.phase}"
            shared.store.set(shared.key(shared.rank), value)
            asked = shared.asked
            if asked > shared.answered:
                beats = {rank: _read(shared, rank) for rank in shared.ranks}
                with shared.wake:
                    shared.beats, shared.answered = beats, asked
                    shared.wake.notify_all()
            with shared.wake:
                if not shared.stopping and shared.asked == shared.answered:
                    shared.wake.wait(shared.interval)
                if shared.stopping:
                    return
    except Exception:
        # The store is gone, and with it what others could be told: a look finds no answer.
        with shared.wake:
            shared.dead = True
            shared.wake.notify_all()


def _read(shared: _Shared, rank: int) -> Beat:
    key = shared.key(rank)
    if not shared.store.check([key]):
        return Beat(0, False, "")
    count, failed, phase = shared.store.get(key).decode().split(" ", 2)
    return Beat(int(count), failed == "1", phase)
