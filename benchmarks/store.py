"""Results on disk: one JSON file per machine, one record per case, written after every case.

A run that is stopped loses nothing, and a run of a few cases replaces only these.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.machine import QUIET_SHARE

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1


class Store:
    """The results of one machine.

    Args:
        path: the JSON file; made when the first record is written.
        machine: facts about the machine, from machine.describe().
    """

    def __init__(self, path: Path, machine: dict[str, object] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "machine": {}, "runs": {}, "cases": {}}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if self.data.get("schema") != SCHEMA:
                found = self.data.get("schema")
                raise ValueError(f"Store: schema of {path} must be {SCHEMA}, got {found}")
        if machine is not None:
            self.data["machine"] = machine

    def begin(self, facts: dict[str, object]) -> str:
        """Add a run and return its id; a run of the same minute and commit is continued."""
        run = f"{str(facts['date'])[:16]} {facts['commit']}"
        self.data["runs"].setdefault(run, {**facts, "ceilings": {}})
        return run

    def ceilings(self, run: str, configuration: str, values: dict[str, float]) -> None:
        """Keep what the machine could do when this configuration was measured."""
        self.data["runs"][run]["ceilings"][configuration] = values

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Replace one record and write the file."""
        self.data["cases"][key] = record
        self.save()

    def has(self, key: str, commit: str) -> bool:
        """Whether this commit, with unchanged sources, measured the case undisturbed."""
        record = self.data["cases"].get(key)
        if record is None or commit.endswith("+dirty"):
            return False
        quiet = record.get("others_share", 0.0) < QUIET_SHARE
        return quiet and self.data["runs"].get(record["run"], {}).get("commit") == commit

    def save(self) -> None:
        """Write through a temporary file, without runs that no record names any more."""
        used = {record["run"] for record in self.data["cases"].values()}
        newest = max(self.data["runs"], default=None)
        runs = self.data["runs"]
        self.data["runs"] = {k: v for k, v in sorted(runs.items()) if k in used or k == newest}
        self.data["cases"] = dict(sorted(self.data["cases"].items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps(rounded(self.data), indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def rounded(value: Any) -> Any:
    """The same structure with floats cut to 5 digits: more is noise, and diffs stay short."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
