"""Random nodes against the oracle of onnx_rules.py; under the sanitizers: `make sanitize`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from feinwerk import onnx as feinwerk_onnx

HERE = Path(__file__).resolve().parent


def fuzzed(library: object, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, HERE / "onnx_fuzz.py", library, *arguments]
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("examples", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_a_random_node_is_right_or_rejected(examples: int) -> None:
    result = fuzzed(feinwerk_onnx.library_path(), examples)
    assert result.returncode == 0, f"{result.stderr}\nlast node: {result.stdout[-500:]}"
    seen = ast.literal_eval(result.stdout.splitlines()[-1].removeprefix("seen "))
    assert seen["works"] + seen["rejected"] >= examples
    assert min(seen.values()) > examples / 5  # of both kinds a good part
