"""Paired timing: ours and its peers take turns in one process, and the figure is a ratio.

A shared machine changes speed by the minute, so two times taken apart do not compare. Here every
round takes one sample of each candidate, in an order that rotates from round to round; the ratio
of two samples of one round is one observation, and the median of the observations is reported with
its 10th and 90th percentile and a bootstrap interval.

Cold weights are the rule: a candidate holds enough copies of its weight to exceed the last-level
cache and takes the next copy at each call, as a model does that walks through its layers.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

SAMPLE_SECONDS = 2e-3  # one sample repeats its call until it lasts at least this long
QUIET_SHARE = 0.2  # of one core: below it, the process counts as idle
QUIET_LIMIT = 0.05  # seconds that settle() waits at most


@dataclass
class Candidate:
    """Something to time: calls taken in turn, one for each copy of its data.

    Args:
        name: its label in tables and results.
        calls: functions without arguments; each runs `per_call` operations.
        per_call: operations in one call (an ONNX graph that holds several nodes).
        clock: instead of calls, a function (operations) -> seconds that times itself.
        note: what a reader must know to judge the number.
    """

    name: str
    calls: Sequence[Callable[[], object]] = ()
    per_call: int = 1
    clock: Callable[[int], float] | None = None
    note: str = ""
    inner: int = 1  # calls in one sample, set by calibrate()
    _next: int = field(default=0, repr=False)

    def run(self, calls: int) -> float:
        """Make `calls` calls, each with the next copy; seconds for one operation."""
        if self.clock is not None:
            return self.clock(calls) / calls
        size = len(self.calls)
        turn = [self.calls[(self._next + i) % size] for i in range(calls)]
        self._next += calls
        start = time.perf_counter_ns()
        for call in turn:
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / (calls * self.per_call)

    def calibrate(
        self, sample_seconds: float = SAMPLE_SECONDS, limit_seconds: float = 0.3
    ) -> float:
        """Warm up, choose how many calls make one sample, and return the seconds of a sample."""
        self.run(1)
        once, spent = math.inf, 0.0
        while spent < min(limit_seconds, 3 * sample_seconds):
            seconds = self.run(1) * self.per_call
            once, spent = min(once, seconds), spent + max(seconds, 1e-7)
        self.inner = max(1, math.ceil(sample_seconds / max(once, 1e-7)))
        return self.inner * once

    def sample(self) -> float:
        """Seconds for one operation: one untimed call when calls are short, then the timed ones."""
        settle()
        if self.inner > 1 and self.clock is None:
            self.run(1)
        return self.run(self.inner)


def settle(limit: float = QUIET_LIMIT) -> None:
    """Wait until no thread of this process spins.

    Thread pools (OpenMP's, ONNX Runtime's) keep spinning for milliseconds after their last task;
    the next candidate, whose threads belong to another pool, would have to share cores with them.
    """
    deadline = time.perf_counter() + limit
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(1e-3)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if cpu < QUIET_SHARE * wall or time.perf_counter() > deadline:
            return


@dataclass
class Ratio:
    """How many times faster ours is than the peer (peer seconds / our seconds)."""

    median: float
    p10: float
    p90: float
    low: float  # bootstrap 95 % interval of the median
    high: float
    rounds: int

    def as_dict(self) -> dict[str, float | int]:
        """Plain values for JSON."""
        return asdict(self)


def ratio(ours: Sequence[float], peer: Sequence[float], resamples: int = 2000) -> Ratio:
    """Summarise the pairwise ratios peer[i] / ours[i]."""
    if len(ours) != len(peer) or not len(ours):
        raise ValueError(
            f"ratio: peer must have as many samples as ours, at least one, got {len(peer)}"
        )
    pairs = np.asarray(peer, dtype=np.float64) / np.asarray(ours, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(pairs), size=(resamples, len(pairs)))
    medians = np.median(pairs[picks], axis=1)
    return Ratio(
        median=float(np.median(pairs)),
        p10=float(np.quantile(pairs, 0.1)),
        p90=float(np.quantile(pairs, 0.9)),
        low=float(np.quantile(medians, 0.025)),
        high=float(np.quantile(medians, 0.975)),
        rounds=len(pairs),
    )


@dataclass
class Paired:
    """Samples of all candidates, round by round: seconds for one operation."""

    ours: str
    seconds: dict[str, list[float]]

    def ratio(self, peer: str) -> Ratio:
        """How many times faster ours is than `peer`."""
        return ratio(self.seconds[self.ours], self.seconds[peer])

    def times(self, name: str) -> dict[str, float]:
        """Shortest and median time of one candidate."""
        values = self.seconds[name]
        return {"min": min(values), "median": statistics.median(values)}


def alternate(target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
    """Run setup and target in turn; pytest-benchmark's pedantic mode is its equal."""
    for _ in range(rounds):
        setup()
        target()


def paired(
    ours: Candidate,
    *peers: Candidate,
    seconds: float = 1.0,
    min_rounds: int = 7,
    max_rounds: int = 61,
    sample_seconds: float = SAMPLE_SECONDS,
    run: Callable[[Callable[[], None], Callable[[], None], int], None] = alternate,
) -> Paired:
    """Time `ours` and every peer in turn and return all samples.

    A round is A B C ..., the next A C ... B: ours is always the timed target, the peers run before
    it in an order that rotates, so that none always follows the same neighbour.

    Args:
        ours: the candidate whose ratios are asked for.
        peers: what it is compared with.
        seconds: time to spend on the rounds, warm-up not counted.
        min_rounds: rounds to make even if that takes longer.
        max_rounds: rounds to stop at.
        sample_seconds: how long one sample lasts at least.
        run: makes the rounds; the pytest fixture passes `benchmark.pedantic` here.
    """
    everyone = [ours, *peers]
    names = [c.name for c in everyone]
    if len(set(names)) != len(names):
        raise ValueError(f"paired: names must differ, got {names}")
    cost = sum(c.calibrate(sample_seconds) + 2e-3 for c in everyone)
    rounds = max(min_rounds, min(max_rounds, int(seconds / cost)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    turn = itertools.count()

    def others() -> None:
        shift = next(turn) % max(1, len(peers))
        for peer in (*peers[shift:], *peers[:shift]):
            samples[peer.name].append(peer.sample())
        settle()

    def target() -> None:
        samples[ours.name].append(ours.sample())

    run(target, others, rounds)
    return Paired(ours.name, samples)


def copies_beyond_cache(nbytes: int, cache_bytes: int, factor: float = 2.0, most: int = 256) -> int:
    """How many copies of `nbytes` a candidate needs so that none is still cached at its turn."""
    return max(1, min(most, math.ceil(factor * cache_bytes / max(nbytes, 1))))
