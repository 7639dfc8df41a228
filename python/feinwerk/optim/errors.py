"""What can go wrong between ranks, each as a type of its own with the facts as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ShardingError(RuntimeError):
    """Ranks cannot go on together: the base of all that follows.

    After it a collective may be half done on some ranks: restart from the last checkpoint.
    """


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class PeerFailure(ShardingError):
    """A peer died, or left, while this rank was waiting for it.

    Attributes:
        phase: what this rank was doing, such as "reduce-scatter bucket 3".
        peers: the global ranks that failed, as far as known; empty if none could be told.
        reason: what the transport said, or "".
    """

    def __init__(self, phase: str, peers: Sequence[int] = (), reason: str = "") -> None:
        """Name the phase and the peers."""
        self.phase, self.peers, self.reason = phase, tuple(peers), reason
        who = _ranks(self.peers) if self.peers else "a peer"
        super().__init__(f"{phase}: {who} failed" + (f" ({reason})" if reason else ""))

    def __reduce__(self) -> tuple[type[PeerFailure], tuple[str, tuple[int, ...], str]]:
        """Travel between ranks with all attributes."""
        return type(self), (self.phase, self.peers, self.reason)


class PhaseTimeout(ShardingError):
    """A phase did not end in time: a peer is stopped, stuck, slow, or never came to it.

    Attributes:
        phase: what this rank was doing, such as "all-gather bucket 0".
        peers: the global ranks that show no sign of life, as far as known; empty if all do.
        seconds: how long was waited.
    """

    def __init__(self, phase: str, peers: Sequence[int] = (), seconds: float = 0.0) -> None:
        """Name the phase, the peers and the limit."""
        self.phase, self.peers, self.seconds = phase, tuple(peers), seconds
        who = f"; no sign of life from {_ranks(self.peers)}" if self.peers else ""
        super().__init__(f"{phase}: not done after {seconds:g} s{who}")

    def __reduce__(self) -> tuple[type[PhaseTimeout], tuple[str, tuple[int, ...], float]]:
        """Travel between ranks with all attributes."""
        return type(self), (self.phase, self.peers, self.seconds)


class Disagreement(ShardingError):
    """Ranks differ in something that must be the same on all of them.

    Attributes:
        op: who found it.
        name: the first thing that differs, such as "shape of parameter 3 ('0.weight')".
        held: for each value found, the global ranks that have it.
    """

    def __init__(
        self,
        op: str,
        name: str,
        held: Mapping[str, Sequence[int]],
        rule: str = "be the same on all ranks",
    ) -> None:
        """Name the difference, and who holds what."""
        self.op, self.name, self.rule = op, name, rule
        self.held = {value: tuple(ranks) for value, ranks in held.items()}
        got = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in self.held.items())
        super().__init__(f"{op}: {name} must {rule}, got {got}")

    def __reduce__(
        self,
    ) -> tuple[type[Disagreement], tuple[str, str, dict[str, tuple[int, ...]], str]]:
        """Travel between ranks with all attributes."""
        return type(self), (self.op, self.name, self.held, self.rule)
