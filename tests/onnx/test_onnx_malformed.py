"""Malformed models and hard hosts: each is an ONNX Runtime exception that says why, or works."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hosting_cases
import malformed_cases
import pytest
from malformed_cases import Case
from onnx_rules import offenders
from onnx_specs import Spec

from feinwerk import onnx as feinwerk_onnx

HERE = Path(__file__).resolve().parent
MODULES = {"malformed_cases": malformed_cases, "hosting_cases": hosting_cases}
ALL = [(module, case) for module, m in MODULES.items() for case in m.cases()]
MAX_CRASHES = 3


def run_from(module: str, first: int) -> tuple[list[dict[str, str]], int, str]:
    """The lines of a process that runs a module's cases from one on, its status and its errors."""
    command = [sys.executable, HERE / "case_run.py", feinwerk_onnx.library_path(), module]
    result = subprocess.run(
        [str(part) for part in (*command, first)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return (
        [json.loads(line) for line in result.stdout.splitlines()],
        result.returncode,
        result.stderr,
    )


@functools.lru_cache
def outcomes(module: str) -> dict[str, dict[str, str]]:
    """Every case's outcome; after a crash a new process goes on behind the case that crashed."""
    found: dict[str, dict[str, str]] = {}
    names = [case.name for case in MODULES[module].cases()]
    for _ in range(MAX_CRASHES):
        lines, status, errors = run_from(module, len(found))
        found |= {line["name"]: line for line in lines if "name" in line}
        if len(found) == len(names):
            assert status == 0, errors  # nor does the process fail on its way out
            break
        started = lines[-1]["start"] if lines else names[len(found)]
        found[started] = {"outcome": "crashed", "text": f"status {status}: {errors[-2000:]}"}
    return found


@pytest.mark.parametrize(("module", "case"), ALL, ids=lambda v: getattr(v, "name", ""))
def test_the_host_survives(module: str, case: Case) -> None:
    got = outcomes(module).get(case.name, {"outcome": "not reached, after other crashes"})
    text = got.get("text", "")
    assert got["outcome"] == ("rejected" if case.says else "works"), text
    for word in case.says:
        assert re.search(word, text), text


@pytest.mark.parametrize(
    "case", [c for _, c in ALL if isinstance(c.node, Spec)], ids=lambda c: c.name
)
def test_the_fuzzer_s_oracle_agrees_with_the_list(case: Case) -> None:
    # The rules that judge random nodes are judged here by the nodes whose fate is written down.
    assert isinstance(case.node, Spec)
    assert bool(offenders(case.node)) == bool(case.says)


def test_an_unknown_isa_is_an_error_and_no_crash() -> None:
    script = (
        "import sys; from onnx_specs import *; print(run(make('NF4Linear').fixed(), sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, feinwerk_onnx.library_path()],
        env=os.environ | {"FEINWERK_ISA": "sse9", "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert re.search(r"must be one of scalar.*got sse9", result.stderr)
