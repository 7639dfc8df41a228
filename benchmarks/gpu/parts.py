"""A part is what runs in a process of its own: the limits, a group of checks, a group of cases.

Its file is written after every record, so that a part that dies or runs out of time loses one
record and not the others; started again, it goes on behind the last.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, correctness
from benchmarks.gpu.device import Device, describe, smi, versions
from benchmarks.store import rounded

LOST = 3  # exit status: the device's context is gone, what is left needs a new process
LIMITS = "limits"
CHECKS, SPEED = "check", "speed"
# Seconds that a part may take.
TIMEOUTS = {LIMITS: 60.0, CHECKS: 200.0, SPEED: 75.0}

Record = dict[str, Any]
Item = tuple[str, Callable[[], Record]]


def names() -> list[str]:
    """Every part in the order of a run: checks run side by side, the others alone."""
    return [
        LIMITS,
        *(f"{CHECKS}:{group}" for group in correctness.GROUPS),
        *(f"{SPEED}:{part}" for part in cases.PARTS),
    ]


def items(name: str, device: Device) -> Iterator[Item]:
    """(key, work) of every record of a part."""
    kind, _, which = name.partition(":")
    if kind == LIMITS:
        from benchmarks.gpu import limits

        yield LIMITS, functools.partial(limits.measure, device)
    elif kind == CHECKS:
        for check in correctness.checks_of(which, device.dry):
            yield check.key, functools.partial(_checked, check, device)
    else:
        measure = getattr(importlib.import_module(cases.PARTS[which]), which)
        for case in cases.CASES:
            if case.part == which:
                yield case.key, functools.partial(measure, device, case)


def _checked(check: correctness.Check, device: Device) -> Record:
    correctness.run(check, device)
    return {"op": check.op}


def run(name: str, device: Device, path: Path) -> int:
    """Run a part, or what is left of it; the process's exit status.

    Args:
        name: one of names().
        device: where.
        path: the part's file.
    """
    data = load(path) or {"part": name, "records": {}, "done": False}
    if "machine" not in data:
        # Checks run side by side and have nothing to say about clocks.
        facts = describe(device, ask=not name.startswith(CHECKS))
        data |= {"machine": facts, "versions": versions()}
    if device.gpu:
        import torch

        # Cases need memory, not fragments of what the last one held.
        torch.cuda.init()
    for key, work in items(name, device):
        if key in data["records"]:
            continue
        data["running"] = key
        save(path, data)
        start = time.perf_counter()
        try:
            record = work()
        except Exception as error:
            print(f"-- {key}\n{traceback.format_exc()}", flush=True)
            record = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        record["seconds"] = time.perf_counter() - start
        data["records"][key] = record
        del data["running"]
        save(path, data)
        try:
            device.synchronize()
            device.release()
        except Exception as error:
            record.setdefault("error", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            save(path, data)
            return LOST
    if name.startswith(SPEED):
        data["after"] = smi()
    data["done"] = True
    save(path, data)
    return 0


def load(path: Path) -> dict[str, Any] | None:
    """A part's file, None where there is none."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save(path: Path, data: dict[str, Any]) -> None:
    """Write a file through a temporary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(rounded(data), indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
