"""Peak memory of a training step with adapters, and of weight_norm, in processes of their own.

What counts is how far the resident set grows during one call: output, gradients, everything saved
between forward and backward, and workspace. Weights, adapters and x are there before.

python -m benchmarks.adapter_memory "feinwerk DoRA" 0      prints the bytes of the first case
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import adapters, peft_peers, plan
from benchmarks.adapters import BLOCKSIZE, RANK, SCALING, AdapterProblem
from benchmarks.memory import growth
from benchmarks.problem import DTYPES, nf4_weight
from feinwerk import ops

STEP, NORM = "forward+backward", "norm over NF4"
CASES = (
    *((STEP, *plan.MAIN_SHAPE, 512, dtype) for dtype in ("fp32", "bf16")),
    (NORM, *plan.NORM_SHAPE, 0, "fp32"),
)
OURS, THEIRS = ("feinwerk LoRA", "feinwerk DoRA"), tuple(
    f"{peft_peers.NAME} {method}" for method in ("LoRA", "DoRA")
)  # fmt: skip
WHO = (*OURS, *THEIRS)


def step_call(who: str, N: int, K: int, M: int, dtype: str) -> Callable[[], object]:
    """One training step."""
    problem = AdapterProblem(N, K, M, DTYPES[dtype], dora=who.endswith("DoRA"), cold=False)
    if who in OURS:
        return adapters.ours(problem).calls[0]
    return peft_peers.unchecked_layer(problem).calls[0]


def norm_call(who: str, N: int, K: int) -> Callable[[], object]:
    """One norm; only DoRA takes it."""
    (made,) = AdapterProblem(N, K, 1, torch.float32, dora=True).adapters()
    if who not in OURS:
        base = peft_peers.linear4bit(N, K, torch.float32)
        return peft_peers.norm_call(base, made)
    weight, *rest = adapters.tables(nf4_weight(N, K, BLOCKSIZE))
    known = ops.row_norms(weight, *rest, shape=(N, K), blocksize=BLOCKSIZE)
    return functools.partial(
        ops.weight_norm, weight, made.A, made.B, *rest,
        scaling=SCALING, base_norm=known, blocksize=BLOCKSIZE,
    )  # fmt: skip


def measure(who: str, what: str, N: int, K: int, M: int, dtype: str) -> int:
    """Bytes that one call needs; a smaller one first loads code and starts threads."""
    make = functools.partial(norm_call, who) if what == NORM else (
        functools.partial(step_call, who, M=M, dtype=dtype)
    )  # fmt: skip
    make(256, 256)()
    return growth(make(N, K))[0]


def measured(who: str, case: int, configuration: plan.Configuration) -> int:
    """Bytes of one case, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.adapter_memory", who, str(case)]
    environment = {**os.environ, **configuration.environment()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def records(
    run: str, configuration: plan.Configuration, isa: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of every case."""
    for i, (what, N, K, M, dtype) in enumerate(CASES):
        asked = [who for who in WHO if what == STEP or who.endswith("DoRA")]
        record = {
            "op": "adapter_memory", "what": what, "N": N, "K": K, "M": M, "dtype": dtype,
            "isa": isa, "threads": configuration.threads, "run": run, "rank": RANK,
            "bytes": {who: measured(who, i, configuration) for who in asked},
        }  # fmt: skip
        yield f"adapter_memory/{what}/{N}x{K}/M{M}/{dtype}/{configuration.threads}T/{isa}", record


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))
    print(measure(sys.argv[1], *CASES[int(sys.argv[2])]))
