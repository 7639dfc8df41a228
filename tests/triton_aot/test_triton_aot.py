"""The ahead-of-time gate passes, and finds every fault that it is there for."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feinwerk import _library

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.driver import driver

from tests.triton_aot import faulty_kernels, gate, launches
from tests.triton_aot.meta_tensors import BF16, meta
from tests.triton_aot.resources import resources_of
from tests.triton_aot.targets import TARGETS, stand_in

OLDEST = "3.6.0"  # of the versions that are supported


def run_gate(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        environment["TRITON_CACHE_DIR"] = str(path / "cache")
    return subprocess.run(
        [sys.executable, "-m", "tests.triton_aot", *arguments],
        env=environment,
        cwd=gate.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_kernel_passes() -> None:
    done = run_gate("--one-in", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.full
def test_every_kernel_passes_for_every_target() -> None:
    done = run_gate("--full")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_every_kernel_passes_with_the_oldest_triton() -> None:
    folder = gate.ROOT / "build" / f"triton-{OLDEST}"
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        command += ["--no-deps", "--target", str(folder), f"triton=={OLDEST}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"Triton {OLDEST} cannot be downloaded: {done.stderr.strip()[-200:]}")
    done = run_gate("--one-in", "4", path=folder)
    assert f"Triton {OLDEST}:" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile in this process, into a cache of its own, and leave no trace."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active
    yield
    driver._active = before


def compiled(target: str, kernel: Any, *arguments: Any, **options: Any) -> list[str]:
    """The faults of a kernel on a target."""
    with launches.collecting() as collector:
        stand_in(TARGETS[target])
        kernel[(1,)](*arguments, **{"enable_fp_fusion": False, **options})
    (launch,) = collector.launches.values()
    found = resources_of(launch.compile(), launch.target)
    return collector.failures + gate.faults(launch.target, found)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_sound_kernel_has_no_faults(target: str) -> None:
    assert compiled(target, faulty_kernels.sound_kernel, meta(64), 64) == []


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("target", "size"), [("sm_80", 14), ("sm_90", 14), ("gfx942", 16)])
def test_a_spill_is_found(target: str, size: int) -> None:
    x = meta(2**size)  # gfx942: twice the lanes, and twice their registers
    (fault,) = compiled(target, faulty_kernels.spilling_kernel, x, 2**size, num_warps=1)
    assert fault.startswith("spills ")


@pytest.mark.usefixtures("compiler")
def test_shared_memory_above_the_devices_is_found() -> None:
    x = meta(64, 64, dtype=BF16)
    kernel = faulty_kernels.product_kernel
    assert compiled("sm_80", kernel, x, x, 9, 64, "tf32", num_stages=4) == []
    (fault,) = compiled("sm_80", kernel, x, x, 9, 64, "tf32", num_stages=16)
    assert "sm_80 has 166912" in fault


@pytest.mark.usefixtures("compiler")
def test_static_shared_memory_counts() -> None:
    with launches.collecting() as collector:
        stand_in(TARGETS["sm_90"])
        faulty_kernels.table_kernel[(1,)](meta(64), 64, enable_fp_fusion=False)
    (launch,) = collector.launches.values()
    assert resources_of(launch.compile(), launch.target).shared == 32768


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("wait", ["first", "late", "never"])
def test_a_kernel_that_reads_before_it_waits_is_found(wait: str) -> None:
    kernel = faulty_kernels.early_kernel
    assert compiled("sm_90", kernel, meta(64), 64, wait) == []  # launched after the one before it
    faults = compiled("sm_90", kernel, meta(64), 64, wait, launch_pdl=True)
    assert len(faults) == (wait != "first")
    assert all("before it waits" in fault for fault in faults)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_a_product_has_its_matrix_instruction(target: str) -> None:
    kernel, x = faulty_kernels.product_kernel, meta(64, 64, dtype=BF16)
    with launches.collecting() as collector:
        stand_in(TARGETS[target])
        kernel[(1,)](x, x, 3, 64, "tf32", enable_fp_fusion=False)
        kernel[(1,)](x.float(), x.float(), 3, 64, "ieee", enable_fp_fusion=False)
    narrow, wide = (
        resources_of(launch.compile(), launch.target) for launch in collector.launches.values()
    )
    assert narrow.needs_matrix
    assert narrow.matrix in TARGETS[target].matrix
    assert gate.faults(TARGETS[target], narrow) == []
    (fault,) = gate.faults(TARGETS[target], dataclasses.replace(narrow, matrix="fma"))
    assert fault.startswith("has a product, but none of ")
    assert not wide.needs_matrix


@pytest.mark.usefixtures("compiler")
def test_a_launch_with_fusion_is_found() -> None:
    kernel = faulty_kernels.sound_kernel
    for options in ({"enable_fp_fusion": True}, {}):
        with launches.collecting() as collector:
            stand_in(TARGETS["sm_90"])
            kernel[(1,)](meta(64), 64, **options)
        (failure,) = collector.failures
        assert "fusion" in failure


@pytest.mark.usefixtures("compiler")
def test_a_kernel_that_does_not_compile_is_found() -> None:
    with launches.collecting() as collector:
        stand_in(TARGETS["sm_90"])
        faulty_kernels.broken_kernel[(1,)](meta(64), 64, enable_fp_fusion=False)
    ((result, _),) = gate.compile_all(list(collector.launches.values()), processes=1)
    assert isinstance(result, str)
    assert "CompilationError" in result


def test_every_op_has_inputs() -> None:
    assert {each.op for each in gate.inputs()} == set(_library.OPS)


def test_a_kernel_without_inputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"foo.foo_fwd_kernel": None}
    monkeypatch.setattr(gate, "kernels", lambda: found)
    monkeypatch.setattr(gate, "launches_of", lambda wanted: ([], []))
    (failure,) = gate.run(full=False).failures
    assert failure.startswith("foo.foo_fwd_kernel: no input reaches this kernel")


def test_the_records_differences_are_told() -> None:
    row = ("a.b_kernel", "sm_90", "i32", "N=1", "32", "0", "0", "", "")
    other = ("a.b_kernel", "sm_80", "i32", "N=1", "32", "0", "0", "", "")
    more = (*row[:4], "40", *row[5:])
    outcome = gate.Outcome([row], [], ("sm_90",))
    assert gate.differences(outcome, gate.read(gate.written([row, other]))) == []
    (changed,) = gate.differences(outcome, [more])
    assert changed.startswith("changed: ")
    assert "registers 40" in changed
    (new,) = gate.differences(outcome, [])
    assert new.startswith("new: ")
    (gone,) = gate.differences(gate.Outcome([], [], ("sm_90",)), [row, other])
    assert gone.startswith("gone: ")
    assert "sm_90" in gone
