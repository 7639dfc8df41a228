"""The benchmarks' own arithmetic: ratios, turns, copies, results, bars and text; no timing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as entry
from benchmarks import bars, harness, machine, plan, report
from benchmarks.harness import Candidate
from benchmarks.problem import Problem, check, ours
from benchmarks.store import Store
from feinwerk import backends


def timed(name: str, seconds: float, log: list[str] | None = None) -> Candidate:
    """A candidate whose clock is a constant."""

    def clock(calls: int) -> float:
        if log is not None:
            log.append(name)
        return seconds * calls

    return Candidate(name, clock=clock)


@pytest.fixture(autouse=True)
def _never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settle", lambda limit=0.0: None)


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    found = harness.ratio([1.0, 10.0, 2.0], [2.0, 20.0, 8.0])
    assert found.median == 2.0
    assert found.low <= found.median <= found.high
    assert found.p10 <= found.median <= found.p90
    assert found.rounds == 3


def test_ratio_interval_narrows_with_rounds() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for rounds in (9, 900):
        found = harness.ratio(np.ones(rounds), rng.lognormal(0.7, 0.3, rounds))
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


@pytest.mark.parametrize(("mine", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_rejects_samples_that_are_no_pairs(mine: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="as many samples as ours"):
        harness.ratio(mine, theirs)


def test_paired_gives_every_candidate_a_turn_in_each_round() -> None:
    log: list[str] = []
    result = harness.paired(
        timed("ours", 1e-3, log), timed("a", 2e-3, log), timed("b", 3e-3, log),
        min_rounds=4, max_rounds=4, seconds=100,
    )  # fmt: skip
    rounds = [tuple(log[-12:][i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == [("a", "b", "ours"), ("b", "a", "ours")] * 2
    assert result.ratio("a").median == pytest.approx(2)
    assert result.ratio("b").median == pytest.approx(3)
    assert result.times("b") == {"min": pytest.approx(3e-3), "median": pytest.approx(3e-3)}


def test_paired_keeps_to_its_budget_but_makes_the_least_rounds() -> None:
    slow = harness.paired(timed("ours", 1.0), timed("a", 1.0), seconds=0.1, min_rounds=5)
    assert slow.ratio("a").rounds == 5
    quick = harness.paired(timed("ours", 1e-4), timed("a", 1e-4), seconds=9, max_rounds=13)
    assert quick.ratio("a").rounds == 13


def test_paired_rejects_equal_names() -> None:
    with pytest.raises(ValueError, match="names must differ"):
        harness.paired(timed("a", 1.0), timed("a", 1.0))


def test_paired_hands_rounds_to_its_runner() -> None:
    seen = []

    def runner(target, setup, rounds: int) -> None:
        seen.append(rounds)
        harness.alternate(target, setup, rounds)

    harness.paired(timed("ours", 1e-3), timed("a", 1e-3), min_rounds=3, max_rounds=3, run=runner)
    assert seen == [3]


def test_a_candidate_walks_through_its_copies_across_samples() -> None:
    log: list[int] = []
    candidate = Candidate("x", [lambda i=i: log.append(i) for i in range(3)])
    candidate.run(2)
    candidate.run(5)
    assert log == [0, 1, 2, 0, 1, 2, 0]


def test_calibrate_repeats_short_calls_only() -> None:
    short, long = timed("short", 1e-4), timed("long", 0.5)
    assert short.calibrate(2e-3) == pytest.approx(2e-3)
    assert (short.inner, long.calibrate(2e-3), long.inner) == (20, 0.5, 1)


def test_per_call_divides_the_time_of_a_graph_of_many_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count(0, 8_000_000)
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(ticks))
    assert Candidate("graph", [lambda: None], per_call=4).run(1) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("nbytes", "cache", "copies"), [(8, 80, 20), (1000, 80, 1), (1000, 800, 2), (1, 10**9, 256)]
)
def test_copies_beyond_cache(nbytes: int, cache: int, copies: int) -> None:
    assert harness.copies_beyond_cache(nbytes, cache) == copies


def test_traffic_and_operations_of_a_problem() -> None:
    problem = Problem(128, 64, 2, torch.bfloat16)
    reads, writes = problem.traffic
    packed, codes, nested = 128 * 64 // 2, 128, 4 + 1024 + 4
    assert reads == packed + codes + nested + 2 * 64 * 2
    assert writes == 2 * 128 * 2
    assert problem.operations == 2 * 2 * 128 * 64


@pytest.mark.parametrize("what", ["forward", "dX", "int8 forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_candidate_passes_the_check_and_a_wrong_one_does_not(
    what: str, dtype: torch.dtype
) -> None:
    compute = "int8" if what == "int8 forward" else "exact"
    problem = Problem(96, 192, 3, dtype, backward=what == "dX")
    candidate = ours(problem, compute)
    check(problem, candidate, compute)
    right = candidate.calls[0]
    with pytest.raises(AssertionError):
        check(problem, Candidate("wrong", [lambda: right() * 1.2]), compute)


def test_limits_scale_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "stream_seconds", lambda threads, r, w: (r + w) / 1e9)
    for cold in (True, False):
        limit = machine.memory_limit(3 << 20, 1 << 20, threads=2, cold=cold)
        assert limit.run(2) == pytest.approx((4 << 20) / 1e9)
    monkeypatch.setattr(machine, "arithmetic", lambda unit, threads: 1e12)
    assert machine.arithmetic_limit("fma512", 5e9, 2).run(3) == pytest.approx(5e-3)


def test_roofline_names_what_bounds() -> None:
    values = {"read_gbps": 10.0, "write_gbps": 5.0, "fma512_gops": 100.0, "amx_bf16_gops": 1000.0}
    slow = machine.roofline(values, "amx", "fp32", 10**9, 10**9, 1e9)
    assert slow == ("memory", pytest.approx(0.3))
    assert machine.roofline(values, "amx", "fp32", 1, 1, 1e11) == ("fp32 FMA, 512 bit", 1.0)
    assert machine.roofline(values, "amx", "bf16", 1, 1, 1e12) == ("AMX bf16 tiles", 1.0)
    assert machine.roofline(values, "avx512", "bf16", 1, 1, 1e11)[1] == 1.0
    assert machine.roofline(values, "", "bf16", 10, 0, 1e11)[0] == "memory"


def test_the_machine_can_be_probed() -> None:
    assert machine.stream_seconds(1, 1 << 20, 1 << 18) > 0
    assert machine.cache_bytes() > 0
    assert machine.name() == machine.name().lower()
    assert 0 <= machine.OtherLoad().share() <= 1


def record(**values: object) -> dict[str, object]:
    """A record as conftest.compare stores it."""
    times = {"min": 1e-3, "median": 2e-3}
    spread = {"p10": 1.9, "p90": 4.1, "low": 2.4, "high": 3.3, "rounds": 9}
    return {
        "op": "nf4_linear", "what": "forward", "N": 4096, "K": 4096, "M": 64, "dtype": "bf16",
        "cold": True, "threads": 2, "isa": "amx", "onednn": "", "copies": 14, "ours": times,
        "read_bytes": 9, "write_bytes": 1, "gbps": 1.0, "gflops": 2.0,
        "bound": "memory", "share_of_limit": 0.61, "missing": {"x": "why"},
        "peers": {
            "bitsandbytes": {**times, "ratio": {"median": 2.9, **spread}, "note": ""},
            "dense": {**times, "ratio": {"median": 1.5, **spread, "low": 1.2}, "note": "n"},
        },
        "limits": {"memory": {**times, "share": {"median": 0.7, **spread}}},
        "run": "r", "seconds": 1.0, "others_share": 0.0, **values,
    }  # fmt: skip


def test_bars_take_the_best_isa_and_say_what_is_open() -> None:
    slow = record(isa="avx2")
    data = {"cases": {"a": slow, "b": record()}}
    by_label = {
        (v.bar.label(), v.bar.against[0]): v for v in bars.verdicts(data) if v.ratio is not None
    }
    dense = by_label["M=64 bf16 forward", "dense"]
    assert dense.met
    assert not dense.open
    bnb = by_label["M=64 bf16 forward", "bitsandbytes"]
    assert bnb.met is False
    assert bnb.open
    assert bars.find(data, "forward", 64, "bf16", isa="avx2") is slow
    assert bars.find(data, "forward", 65, "bf16") is None


def test_every_bar_has_a_case_in_the_quick_plan() -> None:
    planned = set()
    features = ["avx2", "avx512f", "amx_bf16"]
    for configuration in plan.configurations("quick", "", "", features):
        for op in plan.OPS:
            for case in plan.cases(op, "quick", configuration):
                where = (configuration.isa, configuration.onednn)
                key = (case.op, case.what, (case.N, case.K), case.M, case.dtype, case.cold)
                planned.add((*key, *where))
    for bar in bars.BARS:
        key = (bar.op, bar.what, bar.shape, bar.M, bar.dtype, True, bar.isa, bar.onednn)
        assert key in planned


@pytest.mark.parametrize("level", plan.LEVELS)
def test_no_two_cases_share_a_key(level: str) -> None:
    for configuration in plan.configurations(level, "", "", ["avx512f", "amx_bf16"]):
        keys = [
            case.key(configuration, "amx")
            for op in plan.OPS
            for case in plan.cases(op, level, configuration)
        ]
        assert len(keys) == len(set(keys))


def test_a_shape_of_the_users_own_runs_every_row_count() -> None:
    found = plan.cases("nf4_linear", "default", plan.Configuration(), (100, 64))
    assert {case.M for case in found} == set(plan.ROWS)
    assert {(case.N, case.K) for case in found} == {(100, 64)}
    for op in ("lora_linear", "grouped_lora_linear", "weight_norm", "nf4_quantize"):
        assert plan.cases(op, "default", plan.Configuration(), (100, 64))


def test_store_merges_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    facts = {"date": "2026-01-01T10:00:00", "commit": "abc"}
    store = Store(path, {"name": "m"})
    run = store.begin(facts)
    store.put("one", record(run=run, gbps=1.23456789))
    store.put("two", record(run=run, others_share=0.5))
    later = Store(path)
    assert later.has("one", "abc")
    assert not later.has("two", "abc")  # disturbed
    assert not later.has("one", "def")
    assert not later.has("one", "abc+dirty")
    again = later.begin({"date": "2026-01-02T10:00:00", "commit": "def"})
    later.put("one", record(run=again))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data["cases"]) == {"one", "two"}
    assert set(data["runs"]) == {run, again}
    later.put("two", record(run=again))
    assert set(json.loads(path.read_text(encoding="utf-8"))["runs"]) == {again}


def test_store_rejects_another_schema(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"schema": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match="schema"):
        Store(path)


def results() -> dict[str, object]:
    """A whole results file of two matmuls and a memory record."""
    ceilings = {"read_gbps": 20.0, "amx_bf16_gops": 4000.0}
    memory = {
        "op": "memory", "what": "dX", "N": 4096, "K": 4096, "M": 1, "dtype": "bf16", "isa": "amx",
        "threads": 2, "run": "r", "workspace_bytes": 1 << 20, "dense_bytes": 32 << 20,
        "extra_bytes": {"feinwerk": 1 << 20, "dense": 0, "bitsandbytes": 33 << 20},
    }  # fmt: skip
    run = {"date": "2026-01-01T10", "commit": "abc", "versions": {"torch": "2"}}
    return {
        "machine": machine.describe(),
        "runs": {"r": {**run, "ceilings": {"2 threads, best": ceilings}}},
        "cases": {"a": record(), "b": record(what="dX"), "memory": memory},
    }


def test_report_renders_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    report.render(page, results())
    page.write_text(page.read_text(encoding="utf-8") + "kept\n", encoding="utf-8")
    report.render(page, results())
    text = page.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count("## Bars") == 1
    assert text.endswith("kept\n")
    assert "2 ms, 2.9x" in text
    assert "1.5x [1.2, 3.3]" in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        report.render(page, results())


def test_report_lines_of_a_case_name_everything() -> None:
    text = report.case_lines("title", record(others_share=0.4))
    for word in (
        "title",
        "feinwerk",
        "dense",
        "2.9x",
        "limit: memory",
        "61 %",
        "70 %",
        "why",
        "40 %",
    ):
        assert word in text


def test_plot_is_drawn(tmp_path: Path) -> None:
    from benchmarks import plot

    plot.draw(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_labels_do_not_touch() -> None:
    from benchmarks import plot

    placed = plot.spread_labels({"a": 0.5, "b": 0.51, "c": 0.1}, 0.1)
    assert placed == {"c": 0.1, "a": 0.5, "b": pytest.approx(0.6)}


@pytest.mark.parametrize("arguments", [["--op", "nope"], ["--shape", "4096"], ["--threads", "two"]])
def test_the_entry_rejects_bad_options(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        entry.parse(arguments)
    assert "must be" in capsys.readouterr().err


@pytest.mark.full
def test_one_case_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    isa = backends.isa() or "scalar"
    arguments = ["--op", "nf4_linear", "--shape", "64x128", "--threads", "1", "--isa", isa]
    assert entry.main([*arguments, "--only", "M=4 bf16", "--results", str(path)]) == 0
    (found,) = json.loads(path.read_text(encoding="utf-8"))["cases"].values()
    assert (found["isa"], found["threads"], found["M"]) == (isa, 1, 4)
    assert {"dense", "bitsandbytes"} <= set(found["peers"])
    assert found["ours"]["min"] > 0
