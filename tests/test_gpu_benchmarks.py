"""The GPU benchmarks without a GPU: checks that can fail, timing, processes, a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import cases, correctness, parts, timing, verdicts
from benchmarks.gpu import device as device_module
from benchmarks.gpu.cases import Case
from benchmarks.gpu.correctness import Check
from benchmarks.gpu.device import Device
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


def test_parts_are_chosen_by_name() -> None:
    assert entry.chosen("") == parts.names()
    assert entry.chosen("limits,decode") == ["limits", "speed:decode"]
    assert entry.chosen("lora-1,optimizer")[0] == "check:lora-1"
    assert set(entry.chosen("lora")) == {"check:lora-1", "check:lora-2", "speed:lora"}
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


class _Context:
    """Stands for streams and graphs; counts how often its work is replayed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.replays = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def replay(self) -> None:
        self.replays += 1


def test_the_lines_that_only_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Context)
    monkeypatch.setattr(torch.cuda, "Stream", _Context)
    for name in ("stream", "graph", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, _Context)
    slept: list[int] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: device_module.HostEvent())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + 64 + 40)
    facts = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
        total_memory=80 << 30, L2_cache_size=50 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    gpu = Device("cuda", dry=True)
    ready = timing.prepare(gpu, timing.Contender("ours", [lambda: None]))
    assert ready.how == "graph"
    assert ready.run.__self__.replays == 3  # type: ignore[attr-defined]
    record = timing.paired(gpu, timing.Contender("a", [int]), timing.Contender("b", [int]))
    assert record["ours"]["how"] == "graph"
    assert slept
    assert min(slept) > 0
    assert gpu.extra_bytes(lambda: (torch.zeros(16), [None])) == 40
    gpu.release()
    found = device_module.describe(gpu)
    assert found["name"] == "nvidia-h100-80gb-hbm3"
    assert found["l2_bytes"] == 50 << 20
    gpu.dry = False
    assert timing.copies(gpu, 30 << 20) == 5
    assert timing.copies(gpu, 120 << 20) == 2


class _Failing(_Context):
    """A capture whose end complains as well, and leaves its stream and its pool behind."""

    def __exit__(self, *args: object) -> None:
        raise RuntimeError("a previous error during capture")


def test_a_failed_capture_is_undone_and_says_what_failed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDAGraph", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, _Context)
    monkeypatch.setattr(torch.cuda, "graph", _Failing)
    generator = types.SimpleNamespace(clone_state=lambda: "fresh")
    done: list[object] = []
    generator.graphsafe_set_state = done.append
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_stream", _Context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append("stream"))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args: done.append(args), raising=False)
    calls = iter([None, ValueError("the first")])

    def work() -> None:
        error = next(calls)
        if error is not None:
            raise error

    with pytest.raises(ValueError, match="the first"):
        Device("cuda", dry=True).captured(work)
    assert done == ["stream", (0, "pool"), (0, "pool"), "fresh"]


def test_nvidia_smi_is_read_and_may_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_module.smi() == {}
    program = tmp_path / "nvidia-smi"
    values = ", ".join(str(i) for i in range(len(device_module.FACTS)))
    program.write_text(f"#!/bin/sh\necho '{values}'\n", encoding="utf-8")
    program.chmod(0o755)
    assert device_module.smi()["driver_version"] == "1"
