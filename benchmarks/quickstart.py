"""The quickstart's training step end to end beside stock PEFT + bitsandbytes, by its own --compare.

The comparison does not depend on what was trained before it, so one step is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plan

METHODS = ("qlora", "qdora")
DTYPES = {"bf16": "bfloat16"}  # the quickstart's own; fp32 takes twice as long


def compared(method: str, dtype: str, configuration: plan.Configuration) -> dict[str, Any]:
    """What the command reports as its comparison."""
    environment = {**os.environ, **configuration.environment()}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "feinwerk.cli", "quickstart", "--output", folder, "--compare",
            "--method", method, "--dtype", DTYPES[dtype], "--threads", str(configuration.threads),
            "--steps", "1", "--held-out", "4", "--no-generate",
        ]  # fmt: skip
        subprocess.run(command, env=environment, check=True)
        text = (Path(folder) / "report.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["comparison"]
    return found


def records(
    run: str, configuration: plan.Configuration, isa: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of every method and dtype."""
    for dtype in DTYPES:
        for method in METHODS:
            found = compared(method, dtype, configuration)
            ours, theirs = found["ours"], found["theirs"]
            record = {
                "op": "quickstart", "what": method, "dtype": dtype, "isa": isa, "run": run,
                "threads": configuration.threads, "against": found["peer"],
                "ratio": {**found["ratio"], "rounds": len(ours["seconds"])},
                "ours": found["seconds_per_step"]["ours"],
                "theirs": found["seconds_per_step"]["theirs"],
                "loss_difference": found["loss_difference"],
                "bytes": {"feinwerk": ours["peak"], found["peer"]: theirs["peak"]},
                "resident": {"feinwerk": ours["resident"], found["peer"]: theirs["resident"]},
            }  # fmt: skip
            yield f"quickstart/{method}/{dtype}/{configuration.threads}T/{isa}", record
