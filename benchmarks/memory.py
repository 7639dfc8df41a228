"""Peak memory of one call beyond its inputs and its output, measured in processes of their own.

python -m benchmarks.memory feinwerk dX 4096 4096 512 bf16      prints bytes as JSON
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, plan
from benchmarks.harness import Candidate
from benchmarks.problem import DTYPES, Problem, ours
from feinwerk import _native

WHO = {"feinwerk": ours, "dense": peers.dense, "bitsandbytes": peers.bnb_matmul}
CASES = tuple((what, M, dtype) for dtype in ("bf16", "fp32") for M in (1, 512)
              for what in ("forward", "dX"))  # fmt: skip


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) << 10


def growth(call: Any) -> tuple[int, Any]:
    """How far the resident set grows during one call, and its result."""
    ctypes.CDLL(None).malloc_trim(0)  # pages kept from earlier calls would hide new ones
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    before = resident("VmRSS")
    result = call()
    return max(0, resident("VmHWM") - before), result


def extra_bytes(call: Any) -> int:
    """How far the resident set grows during one call, its result left out."""
    grown, result = growth(call)
    return max(0, grown - result.nbytes)


def measure(who: str, what: str, N: int, K: int, M: int, dtype: str) -> int:
    """Extra bytes of one call; a smaller call first loads code and starts threads."""
    settings = {"dtype": DTYPES[dtype], "backward": what == "dX", "cold": False}
    small: Candidate = WHO[who](Problem(256, 256, M, **settings))
    small.calls[0]()
    candidate = WHO[who](Problem(N, K, M, **settings))
    return extra_bytes(candidate.calls[0])


def workspace(what: str, N: int, K: int, M: int, dtype: str) -> int:
    """What Feinwerk's core asks for, in bytes; 0 without the native extension."""
    if not _native.available():
        return 0
    threads = torch.get_num_threads()
    if what == "dX":
        return _native.nf4_linear_backward_workspace(M, N, K, DTYPES[dtype], threads)
    return _native.nf4_linear_workspace(M, N, K, DTYPES[dtype], "exact", threads)


def measured(who: str, configuration: plan.Configuration) -> list[int]:
    """Extra bytes of every case for one candidate, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", who, *map(str, plan.MAIN_SHAPE)]
    environment = {**os.environ, **configuration.environment()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [int(value) for value in json.loads(done.stdout.splitlines()[-1])]


def records(
    run: str, configuration: plan.Configuration, isa: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of every memory case."""
    N, K = plan.MAIN_SHAPE
    extra = {who: measured(who, configuration) for who in WHO}
    for i, (what, M, dtype) in enumerate(CASES):
        record = {
            "op": "memory", "what": what, "N": N, "K": K, "M": M, "dtype": dtype, "isa": isa,
            "threads": configuration.threads, "run": run,
            "extra_bytes": {who: values[i] for who, values in extra.items()},
            "workspace_bytes": workspace(what, N, K, M, dtype),
            "dense_bytes": N * K * DTYPES[dtype].itemsize,
        }  # fmt: skip
        yield f"memory/{what}/{N}x{K}/M{M}/{dtype}/{configuration.threads}T/{isa}", record


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))
    rows, columns = map(int, sys.argv[2:])
    found = [measure(sys.argv[1], what, rows, columns, M, dtype) for what, M, dtype in CASES]
    print(json.dumps(found))
