"""Compiles what the launchers would launch, judges it, and keeps a record of it in the repository.

inputs x targets ── launchers on META ──> launches ── compile, 2 processes ──> rows
│
failures: spills, shared memory, products without matrix <──┤
instructions, kernels that nothing reached                  └──> record.csv
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import re
import resource
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

from tests.triton_aot.inputs import Input, inputs
from tests.triton_aot.launches import Launch, kernels, launches_of
from tests.triton_aot.resources import Resources, resources_of
from tests.triton_aot.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.csv")
HEADER = (
    "kernel", "target", "types", "constants",
    "registers", "spilled", "shared", "matrix", "copies",
)  # fmt: skip
KEY = 4  # columns that say what was compiled; the others say what came out
FIRST = "sm_90"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What one run of the gate found."""

    rows: list[Row]
    failures: list[str]
    complete: tuple[str, ...]  # the targets that every input was compiled for
    times: list[tuple[float, str]] = field(default_factory=list)  # of the processor, longest first


def pinned() -> str:
    """The version of Triton that the record is of."""
    found = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def wanted(full: bool, op: str | None = None) -> list[tuple[Target, Input]]:
    """Every input for every target, or those marked everywhere and for sm_90 the ordinary ones."""

    def early(target: Target, each: Input) -> bool:
        return each.everywhere or (target.name == FIRST and "above 2^31" not in each.name)

    return [
        (target, each)
        for target in TARGETS.values()
        for each in inputs()
        if (full or early(target, each)) and op in (None, each.op)
    ]


def one_in(count: int, launches: Sequence[Launch]) -> list[Launch]:
    """The first launch of each kernel for each target, and every `count`-th after it."""
    met: Counter[tuple[str, str]] = Counter()
    kept = []
    for launch in launches:
        key = launch.name, launch.target.name
        if met[key] % count == 0:
            kept.append(launch)
        met[key] += 1
    return kept


def run(full: bool, op: str | None = None, processes: int = 2, count: int = 1) -> Outcome:
    """Collect, compile one launch in `count`, and judge."""
    launches, failures = launches_of(wanted(full, op))
    if op is None:
        reached = {launch.name for launch in launches}
        failures += [
            f"{name}: no input reaches this kernel: tests/triton_aot/inputs.py"
            for name in kernels()
            if name not in reached
        ]
    launches = one_in(count, launches)
    rows, times = [], []
    for launch, (result, seconds) in zip(launches, compile_all(launches, processes), strict=True):
        times.append((seconds, place(launch)))
        if isinstance(result, str):
            failures.append(f"{place(launch)}: does not compile: {result}")
        else:
            failures += [f"{place(launch)}: {text}" for text in faults(launch.target, result)]
            rows.append(row_of(launch, result))
    complete = tuple(TARGETS) if full and count == 1 else ()
    return Outcome(sorted(rows), failures, complete, sorted(times, reverse=True))


Result = tuple[Resources | str, float]


def compile_all(launches: Sequence[Launch], processes: int) -> list[Result]:
    """Compile in several processes: each launch's resources, or why there are none; and seconds."""
    global _LAUNCHES
    _LAUNCHES = launches
    if processes == 1 or len(launches) < 2:
        return [_compile(i) for i in range(len(launches))]
    # Forked, so that they have the launches; neighbours share the front end's imports.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_compile, range(len(launches)), chunksize=1)


_LAUNCHES: Sequence[Launch] = ()


def _compile(i: int) -> Result:
    launch, start = _LAUNCHES[i], _processor_time()
    result: Resources | str
    try:
        result = resources_of(launch.compile(), launch.target)
    except Exception as error:  # a compiler's errors are of many classes
        result = f"{type(error).__name__}: {error}"[-2000:]
    return result, _processor_time() - start


def _processor_time() -> float:
    """Seconds of this process and of the assemblers that it has started."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def place(launch: Launch) -> str:
    """Name a launch in a message."""
    return f"{launch.name} for {launch.target.name} ({launch.constants}; {launch.first_input})"


def faults(target: Target, found: Resources) -> list[str]:
    """Return what is wrong with a compiled kernel."""
    wrong = []
    if found.spilled:
        wrong.append(f"spills {found.spilled} at {found.registers} registers")
    if found.shared > target.gpu.shared_memory:
        limit = target.gpu.shared_memory
        wrong.append(f"takes {found.shared} bytes of shared memory, {target.name} has {limit}")
    if found.early:
        wrong.append("starts beside the kernel before it, and reads memory before it waits for it")
    if found.needs_matrix and found.matrix in ("", "fma"):
        wrong.append(f"has a product, but none of {', '.join(target.matrix)}")
    return wrong


def row_of(launch: Launch, found: Resources) -> Row:
    """One line of the record."""
    outcome = (found.registers, found.spilled, found.shared, found.matrix, found.copies)
    return (launch.name, launch.target.name, launch.types, launch.constants, *map(str, outcome))


def written(rows: Iterable[Row]) -> str:
    """The record as text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([HEADER, *rows])
    return out.getvalue()


def read(text: str) -> list[Row]:
    """The lines of a record."""
    return [tuple(row) for row in csv.reader(io.StringIO(text))][1:]


def recorded() -> list[Row]:
    """The lines of the repository's record."""
    return read(RECORD.read_text()) if RECORD.exists() else []


def differences(outcome: Outcome, recorded: Sequence[Row]) -> list[str]:
    """Compare with the record; lines for targets that were compiled in part are not missed."""
    before = {row[:KEY]: row[KEY:] for row in recorded}
    now = {row[:KEY]: row[KEY:] for row in outcome.rows}
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (new is None and key[1] not in outcome.complete):
            continue
        what = "new" if old is None else "gone" if new is None else "changed"
        lines.append(f"{what}: {' | '.join(key)}: {_values(old)} -> {_values(new)}")
    return lines


def _values(row: Row | None) -> str:
    if row is None:
        return "nothing"
    return ", ".join(f"{k} {v}" for k, v in zip(HEADER[KEY:], row, strict=True) if v)


def summary(outcome: Outcome) -> str:
    """How much was compiled, by target."""
    counts = [f"{name} {sum(row[1] == name for row in outcome.rows)}" for name in TARGETS]
    names = len({row[0] for row in outcome.rows})
    spent = sum(seconds for seconds, _ in outcome.times)
    return (
        f"Triton {triton.__version__}: {names} kernels, compilations: {', '.join(counts)}; "
        f"{spent:.0f} s of the processor"
    )


def cache() -> Path:
    """Where Triton keeps what it compiled, unless the environment says otherwise."""
    folder = ROOT / "build" / "triton_cache"
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    return folder
