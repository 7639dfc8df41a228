"""The GPU benchmarks' report from a made-up results file: verdicts, the table, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import cases, correctness, parts, plot, report, verdicts
from benchmarks.gpu.cases import Bar
from benchmarks.report import BEGIN, END


def made_up(**changes: Any) -> dict[str, Any]:
    """A results file in which every case took 100 us and every peer was 2 times slower."""
    times = {"us": 100.0, "p10": 99.0, "p90": 103.0, "least": 98.0, "how": "graph", "calls": 9}
    ratio = {"median": 2.0, "p10": 1.9, "p90": 2.1, "low": 1.95, "high": 2.05, "rounds": 11}
    data: dict[str, Any] = {
        "schema": report.SCHEMA,
        "machine": {
            "name": "made-up-gpu", "gpu": "Made-up GPU", "arch": "sm_90", "multiprocessors": 132,
            "memory_bytes": 80 << 30, "l2_bytes": 50 << 20, "nvidia_smi": {"driver_version": "1"},
        },
        "versions": {"torch": "2.11"},
        "limits": {"copy_gbps": 3000.0, "matmul_tflops": 800.0, "after": {"clocks.sm": "1 MHz"}},
        "parts": {name: {"seconds": 1.0, "notes": [], "date": "2026-01-01", "commit": "abc"}
                  for name in parts.names()},
        "checks": {check.key: {"op": check.op, "seconds": 0.1, "part": f"check:{group}"}
                   for group in correctness.GROUPS
                   for check in correctness.checks_of(group, True)},
        "cases": {},
    }  # fmt: skip
    for case in cases.CASES:
        names = {*case.peers, *(bar.against for bar in case.bars)}
        names -= {cases.COPY, cases.WORKSPACE, cases.BNB}
        data["cases"][case.key] = {
            "ours": times, "missing": {cases.BNB: "ImportError: no such module"},
            "peers": {name: {**times, "us": 200.0, "ratio": ratio} for name in names},
            "bytes": 240_000_000, "operations": 0, "workspace_bytes": 16 << 20,
            "part": f"speed:{case.part}", "seconds": 1.0,
        }  # fmt: skip
    return {**data, **changes}


def verdict_of(data: dict[str, Any], key: str, against: str) -> verdicts.Verdict:
    return next(v for v in verdicts.verdicts(data) if (v.case.key, v.bar.against) == (key, against))


def test_verdicts() -> None:
    data = made_up()
    decode = "nf4_linear forward 8192x8192 M=1"
    assert verdict_of(data, decode, cases.DENSE).met is False
    assert verdict_of(data, decode, cases.COPY).value == pytest.approx(0.8)
    assert verdict_of(data, decode, cases.COPY).met
    assert "no such module" in verdict_of(data, decode, cases.BNB).word
    assert verdict_of(data, "nf4_linear forward 4096x4096 M=2048", cases.WORKSPACE).value == 16
    lora = verdict_of(data, "lora_linear LoRA step over NF4 4096x4096 M=4096", cases.BASE)
    assert lora.value == pytest.approx(0.5)  # ours takes half of the base's time
    assert lora.met
    assert all(bar.words for case in cases.CASES for bar in case.bars)
    assert Bar("x", 1.0, at_most=True).words == "<= 1x"


def test_speed_of_a_wrong_op_is_not_claimed() -> None:
    data = made_up()
    key = next(key for key in data["checks"] if key.startswith("nf4_linear: "))
    data["checks"][key]["error"] = "AssertionError: 3 of 9 elements differ"
    found = verdict_of(data, "nf4_linear forward 8192x8192 M=1", cases.COPY)
    assert found.met is None
    assert "a check failed" in found.word
    assert "a check failed" in report.markdown([data])
    assert "3 of 9 elements differ" in report.short(data)
    assert not any(name.startswith("nf4_linear forward") for name, *_ in plot.shares(data))
    assert "not checked" in verdicts.doubt(made_up(checks={}), cases.CASES[-1])


def test_the_short_table_is_short_and_names_everything() -> None:
    text = report.short(made_up())
    assert len(text) <= report.SHORT_CHARACTERS
    for case in cases.CASES:
        assert case.key in text
    assert "2x [1.95, 2.05]" in text
    assert "no such module" in text


def test_the_short_table_keeps_every_case_where_everything_was_measured_and_failed() -> None:
    data = made_up()
    peer = data["cases"][cases.CASES[0].key]["peers"][cases.DENSE]
    for case in cases.CASES:
        data["cases"][case.key]["peers"] |= {
            bar.against: peer for bar in case.bars if bar.against == cases.BNB
        }
    for record in data["checks"].values():
        record["error"] = "AssertionError: 3 of 9 elements differ, first at 3" * 20
    text = report.short(data)
    assert "square_sum fp32" in text
    assert len(text) <= report.SHORT_CHARACTERS


def test_a_failed_case_shows_its_reason() -> None:
    data = made_up()
    case = cases.CASES[0]
    data["cases"][case.key] = {"error": "RuntimeError: illegal address", "part": "speed:decode"}
    assert "illegal address" in report.short(data)
    assert "illegal address" in report.markdown([data])
    assert verdict_of(data, case.key, cases.DENSE).met is None


def test_the_page_regenerates_from_stored_files(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    run = tmp_path / "run.json"
    run.write_text(json.dumps(made_up()), encoding="utf-8")
    at = ["--results", str(results), "--page", str(page), "--images", str(tmp_path)]
    report.main(["--add", str(run), *at])
    first = page.read_text(encoding="utf-8")
    assert "Made-up GPU" in first
    assert (tmp_path / "gpu_made_up_gpu.png").read_bytes().startswith(b"\x89PNG")
    report.main(at)
    assert page.read_text(encoding="utf-8") == first
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        report.main(at)


def test_the_page_in_the_repository_is_what_the_stored_results_say() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    between = text.split(BEGIN, 1)[1].split(END, 1)[0]
    assert between.strip() == report.markdown(report.stored(report.RESULTS)).strip()


def test_a_second_run_replaces_its_parts_only() -> None:
    before, after = made_up(), made_up()
    after["parts"] = {"speed:decode": {**after["parts"]["speed:decode"], "commit": "def"}}
    after["checks"], after["limits"] = {}, {}
    after["cases"] = {k: r for k, r in after["cases"].items() if r["part"] == "speed:decode"}
    after["cases"].popitem()
    both = report.add(after, before)
    assert len(both["cases"]) == len(before["cases"]) - 1
    assert both["checks"] == before["checks"]
    assert both["limits"] == before["limits"]
    assert both["parts"]["speed:decode"]["commit"] == "def"
    other = made_up(machine={**before["machine"], "name": "another"})
    with pytest.raises(ValueError, match="machine must be"):
        report.add(other, before)
