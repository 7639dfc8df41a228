"""Paired timing on a device: ours and its peers take turns, every sample between two events.

A contender holds enough copies of its data to exceed the L2 cache and walks through them. Its walk
is captured into a graph where that can be done, so that launches cost next to nothing; where it
cannot, the device is kept busy while the host queues the sample. Ratios are those of the samples
of one round (benchmarks.harness).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.device import Device
from benchmarks.harness import copies_beyond_cache, ratio

SAMPLE_SECONDS = 4e-4  # a sample repeats its walk until it lasts at least this long
CACHE_FACTOR = 2.5  # copies hold this many times the L2 cache
MOST_COPIES = 48
ROUNDS = (11, 41)  # at least, at most
MOST_REPEATS = 64
SAMPLES = 15  # of a contender alone


@dataclass
class Contender:
    """Something to time.

    Args:
        name: its label.
        calls: functions without arguments, one for each copy of its data.
        graph: whether a graph may be tried.
        note: what a reader must know to judge the number.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    graph: bool = True
    note: str = ""


@dataclass
class Prepared:
    """A contender with its sample: `run` makes `count` calls."""

    name: str
    run: Callable[[], object]
    count: int
    how: str  # "graph" or "eager"
    host_seconds: float  # what a sample costs the host
    device_seconds: float
    note: str


def copies(device: Device, nbytes: int) -> int:
    """How many copies of `nbytes` a contender needs."""
    if device.dry:
        return 2
    return max(2, copies_beyond_cache(nbytes, device.cache_bytes, CACHE_FACTOR, MOST_COPIES))


def prepare(device: Device, contender: Contender) -> Prepared:
    """Warm up, choose how many calls make a sample, and capture it."""
    for call in contender.calls:  # kernels are compiled and libraries load here
        call()
    device.synchronize()

    def walk() -> None:
        for call in contender.calls:
            call()

    once = _seconds(device, walk)
    repeats = 1 if device.dry else min(MOST_REPEATS, max(1, int(SAMPLE_SECONDS / once) + 1))

    def walks() -> None:
        for _ in range(repeats):
            walk()

    run, how, note = walks, "eager", contender.note
    if contender.graph:
        try:
            run, how = device.captured(walks), "graph"
        except Exception as error:
            device.synchronize()
            reason = f"no graph: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            note = f"{note}; {reason}" if note else reason
    run()
    device.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    device.synchronize()
    spent = _seconds(device, run)
    count = repeats * len(contender.calls)
    return Prepared(contender.name, run, count, how, host, spent, note)


def _seconds(device: Device, work: Callable[[], object]) -> float:
    begin, end = device.event(), device.event()
    begin.record()
    work()
    end.record()
    device.synchronize()
    return max(1e-3 * begin.elapsed_time(end), 1e-7)


def paired(
    device: Device, ours: Contender, *peers: Contender, seconds: float = 0.5
) -> dict[str, Any]:
    """Time ours and every peer in turn; a record of times and ratios.

    Args:
        device: where.
        ours: the contender whose ratios are asked for.
        peers: what it is compared with.
        seconds: of device time for the rounds, about.

    Returns:
        {"ours": times, "peers": {name: times with "ratio"}}: `ratio` says how many times faster
        ours is, the median of the rounds' ratios with its spread.
    """
    everyone = [prepare(device, c) for c in (ours, *peers)]
    names = [p.name for p in everyone]
    if len(set(names)) != len(names):
        raise ValueError(f"paired: names must differ, got {names}")
    cost = sum(max(p.device_seconds, p.host_seconds) for p in everyone)
    least, most = (3, 3) if device.dry else ROUNDS
    rounds = max(least, min(most, int(seconds / cost)))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(everyone)
        device.head_start(1.5 * sum(p.host_seconds for p in everyone) + 1e-4)
        for each in (*everyone[shift:], *everyone[:shift]):
            begin, end = device.event(), device.event()
            begin.record()
            each.run()
            end.record()
            marks[each.name].append((begin, end))
        device.synchronize()
    taken = {
        p.name: [1e-3 * b.elapsed_time(e) / p.count for b, e in marks[p.name]] for p in everyone
    }
    found = {p.name: {**times(taken[p.name]), **facts(p)} for p in everyone}
    for name in names[1:]:
        found[name]["ratio"] = ratio(taken[names[0]], taken[name]).as_dict()
    return {"ours": found.pop(names[0]), "peers": found}


def alone(device: Device, contender: Contender) -> dict[str, float]:
    """Times of one contender alone, in microseconds."""
    ready = prepare(device, contender)
    taken = []
    for _ in range(3 if device.dry else SAMPLES):
        begin, end = device.event(), device.event()
        device.head_start(2 * ready.host_seconds + 1e-4)
        begin.record()
        ready.run()
        end.record()
        device.synchronize()
        taken.append(1e-3 * begin.elapsed_time(end) / ready.count)
    return times(taken)


def times(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread in microseconds."""
    values = 1e6 * np.asarray(seconds, dtype=np.float64)
    low, middle, high = (float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9))
    return {"us": middle, "p10": low, "p90": high, "least": float(values.min())}


def facts(prepared: Prepared) -> dict[str, Any]:
    """How a contender was timed."""
    found: dict[str, Any] = {"how": prepared.how, "calls": prepared.count}
    if prepared.how == "eager":
        found["host_us"] = 1e6 * prepared.host_seconds / prepared.count
    if prepared.note:
        found["note"] = prepared.note
    return found


def alternating(items: Sequence[Callable[[Any], object]], data: Sequence[Any]) -> list[Any]:
    """Each item bound to the next of the data, which is used in turn."""
    return [
        (lambda item=item, value=value: item(value))
        for item, value in zip(items, itertools.cycle(data), strict=False)
    ]
