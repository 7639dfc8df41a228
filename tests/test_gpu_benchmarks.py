"""The GPU benchmarks without a GPU: checks that can fail, bars, results, the page, a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import cases, correctness, parts, plot, report, timing, verdicts
from benchmarks.gpu.cases import Bar, Case
from benchmarks.gpu.correctness import Check
from benchmarks.gpu.device import Device
from benchmarks.report import BEGIN, END
from feinwerk import _library, testing

CPU = Device("cpu", dry=True)


def checks() -> list[Check]:
    return [check for group in correctness.GROUPS for check in correctness.checks_of(group, True)]


def test_every_op_is_checked_and_timed() -> None:
    checked = {check.op for check in checks()}
    timed = {case.op for case in cases.CASES}
    for op in _library.OPS:
        assert verdicts.CHECKED_AS.get(op, op) in checked
        assert verdicts.CHECKED_AS.get(op, op) in timed
    assert checked | timed <= set(_library.OPS)


@pytest.mark.parametrize("tiny", [True, False], ids=["dry", "real"])
def test_no_two_checks_share_a_name(tiny: bool) -> None:
    for group in correctness.GROUPS:
        keys = [check.key for check in correctness.checks_of(group, tiny)]
        assert keys
        assert len(keys) == len(set(keys))


def corrupted(value: torch.Tensor) -> torch.Tensor:
    """One element in the middle changed by far more than any rounding."""
    wrong = value.clone()
    flat = wrong.view(-1)
    at = flat.numel() // 2
    if wrong.is_floating_point():
        far = 1000 * float(flat.abs().nan_to_num(0, 0, 0).max()) + 1
        flat[at] = min(far, torch.finfo(wrong.dtype).max)
    else:
        flat[at] ^= 1
    return wrong


@pytest.mark.parametrize("group", correctness.GROUPS)
def test_checks_pass_on_the_reference_and_fail_on_one_wrong_element(group: str) -> None:
    for check in correctness.checks_of(group, True):
        with testing.use_backend("reference"):
            right = check.actual(torch.device("cpu"))
        check.judge(right)
        looked_at = 0
        for name, value in right.items():
            if value.numel() == 0:
                continue
            looked_at += 1
            with pytest.raises(AssertionError):
                check.judge({**right, name: corrupted(value)})
        assert looked_at or "no rows" in check.name or "M=0" in check.name, check.key


def test_a_check_fails_when_two_runs_differ() -> None:
    runs = iter((torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(3)))
    check = Check("op", "unsteady", lambda device: {"y": next(runs)}, lambda results: None)
    correctness.run(check, CPU)
    with pytest.raises(AssertionError, match="second run"):
        correctness.run(check, CPU)


def test_an_element_that_is_not_written_shows() -> None:
    allocate = eval("lambda torch: torch.empty(3)", {"__name__": "feinwerk.somewhere"})
    with correctness.poisoned():
        assert bool(allocate(torch).isnan().all())


def test_bars_are_the_required_ones() -> None:
    found = {(case.key, bar.against): bar for case in cases.CASES for bar in case.bars}
    assert found["nf4_linear forward 8192x8192 M=1", cases.DENSE].required == 2.8
    assert found["nf4_linear forward 14336x4096 M=16", cases.DENSE].required == 1.5
    assert found["nf4_linear forward 14336x4096 M=1", cases.COPY].required == 0.7
    assert found["nf4_linear_backward dX 4096x4096 M=8192", cases.DENSE].required == 0.95
    assert found["nf4_linear forward 4096x4096 M=2048", cases.WORKSPACE].required == 64
    assert found["lora_linear DoRA step over NF4 4096x4096 M=4096", cases.LORA].at_most
    keys = [case.key for case in cases.CASES]
    assert len(keys) == len(set(keys))
    assert {case.part for case in cases.CASES} == set(cases.PARTS)


def test_paired_times_everyone_in_every_round() -> None:
    log: list[str] = []
    ours = timing.Contender("ours", [lambda: log.append("a"), lambda: log.append("A")])
    peer = timing.Contender("peer", [lambda: log.append("b")], note="n")
    record = timing.paired(CPU, ours, peer)
    assert record["ours"]["us"] > 0
    assert record["ours"]["calls"] == 2
    assert record["peers"]["peer"]["ratio"]["rounds"] == 3
    assert record["peers"]["peer"]["note"] == "n"
    assert log[-9:].count("b") == 3
    with pytest.raises(ValueError, match="names must differ"):
        timing.paired(CPU, ours, ours)


def test_what_cannot_be_captured_is_timed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(self: Device, work: object) -> None:
        raise RuntimeError("a call that waits for the device")

    monkeypatch.setattr(Device, "captured", captured)
    ready = timing.prepare(CPU, timing.Contender("ours", [lambda: None]))
    assert ready.how == "eager"
    assert "waits for the device" in ready.note
    assert timing.facts(ready)["host_us"] >= 0


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


def test_parts_are_chosen_by_name() -> None:
    assert entry.chosen("") == parts.names()
    assert entry.chosen("limits,decode") == ["limits", "speed:decode"]
    assert set(entry.chosen("check")) == {f"check:{g}" for g in correctness.GROUPS}
    with pytest.raises(SystemExit, match="must name parts"):
        entry.chosen("nothing")


def test_one_failure_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def items(name: str, device: Device) -> list[parts.Item]:
        def fails() -> parts.Record:
            raise RuntimeError("no kernel")

        return [("a", lambda: {"n": 1}), ("b", fails), ("c", lambda: {"n": 3})]

    monkeypatch.setattr(parts, "items", items)
    path = tmp_path / "part.json"
    assert parts.run("limits", CPU, path) == 0
    data = parts.load(path)
    assert data is not None
    assert data["done"]
    assert data["records"]["a"]["n"] == 1
    assert data["records"]["b"]["error"] == "RuntimeError: no kernel"
    assert data["records"]["c"]["n"] == 3


def test_a_lost_context_ends_the_process_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(parts, "items", lambda name, device: [
        (key, lambda key=key: ran.append(key) or {}) for key in "abc"
    ])  # fmt: skip

    def lost(self: Device) -> None:
        if ran[-1:] == ["b"]:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Device, "synchronize", lost)
    path = tmp_path / "part.json"
    assert parts.run("limits", CPU, path) == parts.LOST
    monkeypatch.setattr(Device, "synchronize", lambda self: None)
    assert parts.run("limits", CPU, path) == 0
    assert ran == ["a", "b", "c"]
    data = parts.load(path)
    assert data is not None
    assert "illegal memory access" in data["records"]["b"]["error"]


def test_dying_processes_are_started_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    parts.save(path, {"records": {}, "done": False, "running": "one"})
    child = entry.Child("limits", path, [], dict(os.environ))
    child.process = subprocess.Popen([sys.executable, "-c", "print('why'); raise SystemExit(7)"])
    child.process.wait()
    child.starts, child.deadline = entry.STARTS, 0.0
    assert child.finished()
    data = parts.load(path)
    assert data is not None
    assert "status 7" in data["records"]["one"]["error"]
    assert "not finished" in child.notes


def test_a_cpu_is_for_dry_runs_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main(["--device", "cpu"])
    assert "--dry" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kind must be"):
        Device("tpu")


@pytest.mark.parametrize("part", cases.PARTS)
def test_every_case_runs_dry(part: str, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    assert parts.run(f"speed:{part}", CPU, path) == 0
    data = parts.load(path)
    assert data is not None
    wanted = [case for case in cases.CASES if case.part == part]
    assert set(data["records"]) == {case.key for case in wanted}
    for case in wanted:
        record = data["records"][case.key]
        assert "error" not in record
        for name in {*case.peers, *(bar.against for bar in case.bars)}:
            if name in (cases.COPY, cases.WORKSPACE):
                assert record["bytes" if name == cases.COPY else "workspace_bytes"] >= 0
            elif name in (cases.BNB, cases.PEFT, cases.PEFT_HALF):
                assert (name in record["peers"]) != (name in record["missing"])
            else:
                assert name in record["peers"]


@pytest.mark.full
def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--dry", "--out", str(tmp_path), "--only", "limits,norm,decode"]
    assert entry.main(arguments) == 0
    data = json.loads((tmp_path / "a-cpu-standing-in.json").read_text(encoding="utf-8"))
    assert data["limits"]["copy_gbps"] > 0
    assert set(data["parts"]) == {"limits", "check:norm", "speed:decode"}
    assert sum(v.value is not None for v in verdicts.verdicts(data)) > 0


def test_sizes_are_tiny_in_dry_runs_only() -> None:
    case = Case("decode", "nf4_linear", "forward", 14336, 4096, 2048)
    assert case.sizes(False) == (14336, 4096, 2048)
    N, K, M = case.sizes(True)
    assert N != K
    assert max(N, K, M) < 100
