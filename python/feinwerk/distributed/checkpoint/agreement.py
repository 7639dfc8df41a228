"""The ranks that save or load together: every phase ends the same way on all of them.

A rank that fails in a phase says so in the exchange that ends the phase, and all raise. A rank that
dies or stalls cannot say anything: then the exchange itself fails, within the timeout, and the
error names the phase. The exchanges run on a gloo group of their own, so that a checkpoint needs no
accelerator, does not touch the training's communicators, and has a timeout of its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

from feinwerk import _checks
from feinwerk.distributed.errors import CheckpointError
from feinwerk.optim.errors import PeerFailure, PhaseTimeout

# The phase in which a TypeError or ValueError is the caller's, and is raised as it is.
ARGUMENTS = "checking the arguments"

_T = TypeVar("_T")
_R = TypeVar("_R")

# One gloo group per training group and timeout; the training group is kept so that no other can
# get its id.
_groups: dict[tuple[int, float], tuple[Any, dist.ProcessGroup]] = {}


@dataclass(frozen=True)
class _Failure:
    """What a failing rank sends instead of its result."""

    rank: int
    text: str
    typed: CheckpointError | None


@dataclass(frozen=True)
class _Outcome(Generic[_T]):
    """What a rank's work came to: a value, or a failure and the exception behind it."""

    value: _T | None = None
    failure: _Failure | None = None
    error: Exception | None = None

    def sent(self) -> Any:
        """Return what travels to the other ranks."""
        return self.value if self.failure is None else self.failure


class Peers:
    """The ranks of a process group, or this process alone.

    Args:
        op: the public function, for messages.
        process_group: whose ranks take part; None for all, or for one process.
        timeout: seconds that a rank may keep the others waiting at the end of a phase.
    """

    def __init__(self, op: str, process_group: dist.ProcessGroup | None, timeout: float) -> None:
        """Join the other ranks."""
        if not timeout > 0:
            _checks.reject(ValueError, op, "timeout", "be a positive number of seconds", timeout)
        self.op, self.timeout = op, timeout
        self.rank, self.world_size = 0, 1
        self._key: tuple[int, float] | None = None
        self._group: dist.ProcessGroup | None = None
        if not (dist.is_available() and dist.is_initialized()):
            return
        base = dist.group.WORLD if process_group is None else process_group
        self.rank, self.world_size = dist.get_rank(base), dist.get_world_size(base)
        if self.rank < 0:
            rule = "contain the calling rank"
            _checks.reject(ValueError, op, "process_group", rule, "a group of other ranks")
        if self.world_size == 1:
            return
        self._key = (id(base), float(timeout))
        if self._key not in _groups:
            group = self._guard("connect", lambda: _new_group(base, timeout))
            _groups[self._key] = (base, group)
        self._group = _groups[self._key][1]

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the manifest."""
        return self.rank == 0

    def together(self, phase: str, work: Callable[[], _T]) -> list[_T]:
        """Do `work` on every rank; return the results of all, or raise on all."""
        outcome = self._attempt(phase, work)
        if self._group is None:
            return [self._unwrap(phase, outcome)]
        outcomes: list[Any] = [None] * self.world_size
        self._guard(
            phase, lambda: dist.all_gather_object(outcomes, outcome.sent(), group=self._group)
        )
        self._raise_first(phase, outcomes, outcome)
        return cast(list[_T], outcomes)

    def first(self, phase: str, work: Callable[[], _T]) -> _T:
        """Do `work` on rank 0; return its result on every rank, or raise on all."""
        outcome = self._attempt(phase, work) if self.is_first else _Outcome()
        if self._group is None:
            return self._unwrap(phase, outcome)
        box = [outcome.sent()]
        self._guard(phase, lambda: dist.broadcast_object_list(box, group=self._group, group_src=0))
        self._raise_first(phase, box, outcome)
        return cast(_T, box[0])

    def plan(
        self, phase: str, work: Callable[[], _T], divide: Callable[[list[_T]], Sequence[_R]]
    ) -> _R:
        """Do `work` on every rank, `divide` the results on rank 0, return each rank its part."""
        outcome = self._attempt(phase, work)
        if self._group is None:
            own = self._unwrap(phase, outcome)
            return self._unwrap(phase, self._attempt(phase, lambda: divide([own])))[0]
        gathered: list[Any] = [None] * self.world_size
        self._guard(
            phase,
            lambda: dist.gather_object(
                outcome.sent(), gathered if self.is_first else None, group=self._group, group_dst=0
            ),
        )
        failures = [item for item in gathered if isinstance(item, _Failure)]
        divided: _Outcome[Sequence[_R]] = _Outcome()
        if self.is_first:
            divided = (
                _Outcome(failure=failures[0])
                if failures
                else self._attempt(phase, lambda: divide(cast(list[_T], gathered)))
            )
        parts: list[Any] | None = None
        if self.is_first:
            failed = divided.failure is not None
            parts = [divided.failure] * self.world_size if failed else list(divided.value or ())
        part: list[Any] = [None]
        self._guard(
            phase, lambda: dist.scatter_object_list(part, parts, group=self._group, group_src=0)
        )
        self._raise_first(phase, part, outcome if outcome.error else divided)
        return cast(_R, part[0])

    def _attempt(self, phase: str, work: Callable[[], _T]) -> _Outcome[_T]:
        try:
            return _Outcome(value=work())
        except (PeerFailure, PhaseTimeout):
            raise
        except Exception as error:
            typed = error if isinstance(error, CheckpointError) else None
            text = f"{type(error).__name__}: {error}"
            return _Outcome(failure=_Failure(self.rank, text, typed), error=error)

    def _unwrap(self, phase: str, outcome: _Outcome[_T]) -> _T:
        self._raise_first(phase, [outcome.failure], outcome)
        return cast(_T, outcome.value)

    def _raise_first(self, phase: str, outcomes: Sequence[Any], own: _Outcome[Any]) -> None:
        failures = [item for item in outcomes if isinstance(item, _Failure)]
        if not failures:
            return
        if phase == ARGUMENTS and isinstance(own.error, TypeError | ValueError):
            raise own.error
        first = failures[0]
        if first.typed is not None:
            raise first.typed from own.error
        if self.world_size == 1:
            raise CheckpointError(f"{self.op}: {phase} failed: {first.text}") from own.error
        ranks = ", ".join(str(item.rank) for item in failures)
        raise CheckpointError(
            f"{self.op}: {phase} failed on rank {ranks}: {first.text}"
        ) from own.error

    def _guard(self, phase: str, exchange: Callable[[], _T]) -> _T:
        """Turn what gloo says about a dead or silent peer into an error with the phase's name."""
        where = f"{self.op}: {phase}"
        try:
            return exchange()
        except RuntimeError as error:
            if self._key is not None:
                _groups.pop(self._key, None)  # gloo's connections are of no use after an error
            text = str(error).lower()
            if "timed out" in text or "timeout" in text:
                raise PhaseTimeout(where, (), self.timeout) from error
            raise PeerFailure(where, (), str(error).partition("\n")[0]) from error


def _new_group(base: Any, timeout: float) -> dist.ProcessGroup:
    limit = datetime.timedelta(seconds=timeout)
    ranks = dist.get_process_group_ranks(base)
    whole = len(ranks) == dist.get_world_size()
    group = dist.new_group(
        None if whole else ranks,
        timeout=limit,
        backend="gloo",
        use_local_synchronization=not whole,  # the ranks outside do not call this
        group_desc="feinwerk_checkpoint",
    )
    return cast(dist.ProcessGroup, group)
