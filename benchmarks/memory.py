"""Peak memory of one call beyond its inputs and its output, measured in a process of its own.

python -m benchmarks.memory feinwerk dX 4096 4096 512 bf16      prints bytes as JSON
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
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


def extra_bytes(call: Any) -> int:
    """How far the resident set grows during one call, its result left out."""
    ctypes.CDLL(None).malloc_trim(0)  # pages kept from earlier calls would hide new ones
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    before = resident("VmRSS")
    result = call()
    return max(0, resident("VmHWM") - before - result.nbytes)


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


def records(run: str, configuration: plan.Configuration, isa: str) -> Any:
    """(key, record) of every memory case, one subprocess for each candidate."""
    N, K = plan.MAIN_SHAPE
    environment = {**os.environ, **configuration.environment()}
    for what, M, dtype in CASES:
        extra = {}
        for who in WHO:
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                who,
                what,
                *map(str, (N, K, M)),
                dtype,
            ]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                extra[who] = int(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(
                    f"memory: {who} {what} M={M} {dtype}: {done.stderr.strip().splitlines()[-1:]}"
                )
                extra[who] = 0
        record = {
            "op": "memory", "what": what, "N": N, "K": K, "M": M, "dtype": dtype, "isa": isa,
            "threads": configuration.threads, "extra_bytes": extra,
            "workspace_bytes": workspace(what, N, K, M, dtype),
            "dense_bytes": N * K * DTYPES[dtype].itemsize, "run": run,
        }  # fmt: skip
        yield f"memory/{what}/{N}x{K}/M{M}/{dtype}/{configuration.threads}T/{isa}", record


if __name__ == "__main__":
    name, direction, *sizes, kind = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))
    print(json.dumps(measure(name, direction, *map(int, sizes), kind)))
