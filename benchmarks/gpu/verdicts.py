"""Judges a results file: every bar met, missed or not measured; shares of the measured limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.bars import inverse
from benchmarks.gpu.cases import CASES, COPY, WORKSPACE, Bar, Case

# Ops whose correctness is checked under another's name: one public function calls both.
CHECKED_AS = {"lora_linear_backward": "lora_linear"}
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """A bar of a case and what was measured for it.

    `value` is a ratio, a share or megabytes; `spread` the 95 % interval of a ratio.
    """

    case: Case
    bar: Bar
    value: float | None = None
    spread: tuple[float, float] | None = None
    peer_us: float | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None where nothing can be said."""
        if self.value is None or self.reason:
            return None
        if self.bar.at_most or self.bar.against == WORKSPACE:
            return self.value <= self.bar.required
        return self.value >= self.bar.required

    @property
    def word(self) -> str:
        """The verdict as text."""
        return {True: "met", False: "missed", None: self.reason or "not measured"}[self.met]


def failures(data: dict[str, Any]) -> dict[str, list[str]]:
    """Op: the names of its checks that failed, with the reason."""
    found: dict[str, list[str]] = {}
    for key, record in data["checks"].items():
        if "error" in record:
            found.setdefault(key.partition(": ")[0], []).append(f"{key}: {record['error']}")
    return found


def passed(data: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Op: (checks that passed, checks)."""
    found: dict[str, tuple[int, int]] = {}
    for key, record in data["checks"].items():
        op = key.partition(": ")[0]
        good, count = found.get(op, (0, 0))
        found[op] = (good + ("error" not in record), count + 1)
    return found


def doubt(data: dict[str, Any], case: Case) -> str:
    """Why the speed of a case is not claimed: the op is wrong somewhere, or was not checked."""
    op = CHECKED_AS.get(case.op, case.op)
    if op in failures(data):
        return "not claimed: a check failed"
    return "" if op in passed(data) else "not claimed: not checked"


def limits_of(data: dict[str, Any]) -> dict[str, float]:
    """Measured limits, {} where they were not measured."""
    found = data["limits"]
    return {k: found[k] for k in ("copy_gbps", "matmul_tflops") if k in found}


@dataclass(frozen=True)
class Rate:
    """Bytes and operations a second, and the share of the limit that is nearer."""

    gbps: float = 0.0
    tflops: float = 0.0
    share: float = 0.0
    bound: str = ""


def rate(data: dict[str, Any], record: dict[str, Any]) -> Rate:
    """How fast a case's record is beside the measured limits."""
    if "ours" not in record:
        return Rate()
    us, limits = record["ours"]["us"], limits_of(data)
    gbps = record.get("bytes", 0) / us * 1e-3
    tflops = record.get("operations", 0) / us * 1e-6
    shares = {
        "memory": gbps / limits["copy_gbps"] if "copy_gbps" in limits else 0.0,
        "matmul": tflops / limits["matmul_tflops"] if "matmul_tflops" in limits else 0.0,
    }
    bound = max(shares, key=lambda name: shares[name])
    return Rate(gbps, tflops, shares[bound], bound if shares[bound] else "")


def judge(data: dict[str, Any], case: Case, bar: Bar) -> Verdict:
    """What the results say about one bar."""
    record = data["cases"].get(case.key)
    if record is None:
        return Verdict(case, bar)
    if "error" in record:
        return Verdict(case, bar, reason=f"failed: {record['error'][:60]}")
    reason = doubt(data, case)
    if bar.against == COPY:
        limit = limits_of(data).get("copy_gbps")
        if limit is None:
            return Verdict(case, bar, reason="no limit measured")
        share = record["bytes"] / record["ours"]["us"] * 1e-3 / limit
        return Verdict(case, bar, share, reason=reason)
    if bar.against == WORKSPACE:
        return Verdict(case, bar, record["workspace_bytes"] / MEGABYTE, reason=reason)
    peer = record["peers"].get(bar.against)
    if peer is None:
        why = record["missing"].get(bar.against, "")
        return Verdict(case, bar, reason=f"not measured: {why}" if why else "")
    ratio = inverse(peer["ratio"]) if bar.at_most else peer["ratio"]
    spread = (ratio["low"], ratio["high"])
    return Verdict(case, bar, ratio["median"], spread, peer["us"], reason)


def verdicts(data: dict[str, Any]) -> Iterator[Verdict]:
    """Every bar of every case."""
    for case in CASES:
        for bar in case.bars:
            yield judge(data, case, bar)
