"""Finds the numbers of feinwerk.triton_tuning on a GPU: times nf4_linear in many configurations.

    PYTHONPATH=python:. python3 -m benchmarks.gpu.sweep_linear out.json

It needs torch, Triton and one GPU, not the native extension. Every configuration is checked against
the error budget before it is timed, in a CUDA graph over copies of the weight that exceed the L2
cache. Processes compile all kernels beforehand, on small tensors. The JSON is rewritten after each
case.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Contender, alone
from feinwerk import testing
from feinwerk.ops.nf4_linear import triton as linear
from feinwerk.triton_tuning import (
    ANY_ROWS,
    DecodeChoice,
    LinearTuning,
    SlabChoice,
    TileChoice,
    VectorChoice,
    linear_tuning,
)

DEADLINE_S = 110.0
SHAPES = ((14336, 4096), (8192, 8192), (4096, 4096))
ROTATED_BYTES = 160 << 20
ALL = 1 << 30

DECODE = [
    DecodeChoice(tile=tile, runs=runs, columns=columns, warps=warps, stages=stages)
    for tile, runs, columns, warps, stages in (
        # Four warps and more take wgmma, which wants x in shared memory, two and fewer mma.
        (64, 8, 8, 2, 4), (64, 8, 8, 2, 3), (64, 8, 8, 2, 6), (64, 4, 8, 2, 4), (64, 4, 8, 2, 3),
        (128, 8, 8, 2, 4), (128, 8, 8, 2, 3), (128, 4, 8, 2, 4), (64, 8, 8, 1, 4),
        (64, 1, 8, 2, 4), (128, 8, 8, 4, 4), (64, 2, 32, 2, 3), (64, 4, 16, 2, 4),
        (128, 4, 16, 2, 3),
    )
]  # fmt: skip
DECODE_PROGRAMS = (4, 8, 12, 16)
TILE = [
    TileChoice(block_m=m, block_n=n, block_k=64, warps=warps, stages=3, lookup=lookup)
    for m, n, warps, lookup in (
        (32, 128, 4, "gather"), (32, 64, 4, "gather"), (64, 128, 8, "gather"),
        (64, 64, 4, "planes"), (128, 128, 8, "gather"),
    )
]  # fmt: skip
TILE_PROGRAMS = (2, 4)
TRANSPOSED = [
    TileChoice(block_m=m, block_n=n, block_k=k, warps=warps, stages=3)
    for m, n, k, warps in ((32, 64, 64, 4), (64, 64, 64, 4), (64, 64, 128, 8), (64, 32, 128, 4))
]
SLAB_MIB = (16, 28, 32, 64)
VECTOR = [
    VectorChoice(words=words, x_words=x_words, warps_per_multiprocessor=resident)
    for words, x_words in ((8, 4), (16, 4), (8, 8), (16, 8), (32, 8), (16, 16))
    for resident in (12, 16, 20)
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One product to time, and the ways to serve it."""

    what: str  # forward or gradient
    M: int
    N: int
    K: int
    tunings: tuple[tuple[str, LinearTuning], ...]

    @property
    def name(self) -> str:
        return f"{self.what} M={self.M} {self.N}x{self.K}"


def ways(base: LinearTuning, what: str, M: int) -> Iterator[tuple[str, LinearTuning]]:
    """Every configuration worth a try for so many rows."""
    change = dataclasses.replace
    if what == "forward" and M <= 2:
        for vector in VECTOR:
            yield f"vector {vector}", change(base, vector=vector)
    base = change(base, vector=VectorChoice(words=0))
    if what == "forward" and M <= 16:
        for choice in DECODE:
            for programs in DECODE_PROGRAMS:
                tried = change(choice, programs=programs)
                yield f"decode {tried}", change(base, decode=tried, decode_many=tried)
    base = change(base, decode_rows=0, tile_rows=0, tile_rows_transposed=0)
    choices = TILE if what == "forward" else TRANSPOSED
    for choice in choices if 16 <= M <= 128 else ():
        for programs in TILE_PROGRAMS if choice.block_m <= max(32, M) <= 2 * choice.block_m else ():
            tried = change(choice, programs=programs)
            served = {"tile": tried, "tile_rows": ALL}
            if what == "gradient":
                served = {"transposed": tried, "tile_rows_transposed": ALL}
            yield f"tile {tried}", change(base, **served)
    if M >= 16:
        for mib in SLAB_MIB:
            for beside, keep in itertools.product((False, True), repeat=2):
                slab = SlabChoice(ANY_ROWS, 0, mib << 20, beside, keep)
                name = f"slab {mib} MiB{', two' * beside}{', kept' * keep}"
                yield name, change(base, slabs=(slab,))


def cases(base: LinearTuning) -> Iterator[Case]:
    wanted = [("forward", M, s) for M in (1, 2, 4, 8, 16) for s in SHAPES[:2]]
    wanted += [("forward", M, s) for M in (32, 128) for s in (SHAPES[2], SHAPES[0])]
    wanted += [("gradient", M, s) for M in (16, 128) for s in (SHAPES[2], SHAPES[0])]
    wanted += [(w, M, SHAPES[0]) for M in (2048, 8192) for w in ("forward", "gradient")]
    for what, M, (N, K) in wanted:
        yield Case(what, M, N, K, tuple(ways(base, what, M)))


class Problem:
    """A weight in copies that exceed the cache, and what multiplies with it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator("cuda").manual_seed(case.N)
        N, K = case.N, case.K

        def random(low: int, high: int, size: int) -> torch.Tensor:
            return torch.randint(
                low, high, (size,), dtype=torch.uint8, device="cuda", generator=generator
            )

        blocks = N * K // 64
        copies = max(2, ROTATED_BYTES // (N * K // 2)) if case.M <= 256 else 1
        nested = (
            torch.rand(-(-blocks // 256), device="cuda", generator=generator) * 0.01 + 0.01,
            torch.linspace(-1, 1, 256, device="cuda"),
            torch.full((), 0.05, device="cuda"),
        )
        packed, absmax = random(0, 256, N * K // 2), random(0, 256, blocks)
        self.tables = [(packed, absmax, *nested)]
        self.tables += [(packed.clone(), absmax.clone(), *nested) for _ in range(copies - 1)]
        width = K if case.what == "forward" else N
        self.x = torch.randn(case.M, width, device="cuda", generator=generator).bfloat16()
        self.sizes = {"N": N, "K": K, "blocksize": 64}

    def dense(self) -> torch.Tensor:
        """The whole W~."""
        (_, _, slab) = next(
            linear.slabs(
                self.tables[0], self.case.N, self.case.K, 64, torch.bfloat16,
                tuning=LinearTuning(slabs=(SlabChoice(ANY_ROWS, ALL, ALL),)),
            )
        )  # fmt: skip
        return slab

    def product(self, tuning: LinearTuning, copy: int) -> torch.Tensor:
        if self.case.what == "forward":
            return linear.multiply(self.x, self.tables[copy], tuning=tuning, **self.sizes)
        return linear.multiply_transposed(self.x, self.tables[copy], tuning=tuning, **self.sizes)


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """The median time of a call, which takes the copies in turn."""
    calls = [functools.partial(call, i) for i in range(copies)]
    return alone(Device(), Contender("product", calls))["us"]


def sweep(case: Case) -> list[dict[str, object]]:
    """Check, then time, every configuration of a case; dense bf16 weights beside them."""
    problem = Problem(case)
    dense = problem.dense()
    weight = dense if case.what == "forward" else dense.t()
    truth, budget = testing.linear_budget(problem.x, weight)
    rows = []
    copies = len(problem.tables)
    for name, tuning in case.tunings:
        row: dict[str, object] = {"case": case.name, "way": name}
        try:
            error = (problem.product(tuning, 0).double() - truth).abs()
            row["within"] = bool((error <= budget).all())
            if row["within"]:
                row["us"] = microseconds(lambda i, t=tuning: problem.product(t, i), copies)
        except Exception as problem_found:  # one that does not fit must not cost the others
            row["error"] = f"{type(problem_found).__name__}: {problem_found}"[:300]
        rows.append(row)
    del truth, budget
    weights = [dense.clone() for _ in range(max(1, copies // 4))]
    x = problem.x
    other = (lambda w: w.t()) if case.what == "forward" else (lambda w: w)
    us = microseconds(lambda i: torch.mm(x, other(weights[i % len(weights)])), len(weights))
    rows.append({"case": case.name, "way": "torch.mm, dense bf16", "us": us})
    return rows


def compile_part(part: int, parts: int) -> None:
    """Compile every parts-th configuration, by running it on a small weight."""
    gpu = linear.gpu_of(torch.device("cuda", 0))
    seen: dict[tuple[str, int, str], Case] = {}
    for case in cases(linear_tuning(gpu.backend, gpu.arch)):
        for name, tuning in case.tunings:
            key = (case.what, min(case.M, 64), name.partition(", programs")[0])
            small = Case(case.what, case.M, 2048, 1024, ((name, tuning),))
            seen.setdefault(key, small)
    for small in list(seen.values())[part::parts]:
        Problem(small).product(small.tunings[0][1], 0)
    torch.cuda.synchronize()


def main(path: str) -> None:
    began = time.monotonic()
    parts = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.gpu.sweep_linear", "--compile"]
    compilers = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    failed = sum(compiler.wait() != 0 for compiler in compilers)
    compiled = time.monotonic() - began
    print(f"compiled in {compiled:.1f} s by {parts} processes, {failed} failed", flush=True)
    gpu = linear.gpu_of(torch.device("cuda", 0))
    found: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [],
    }  # fmt: skip
    for case in cases(linear_tuning(gpu.backend, gpu.arch)):
        if time.monotonic() - began > DEADLINE_S:
            print("out of time: the cases after this are missing")
            break
        rows = sweep(case)
        found["rows"] += rows
        with open(path, "w") as file:
            json.dump(found, file, indent=1)
        timed = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
        print(f"{case.name}  [{time.monotonic() - began:.0f} s]")
        for row in timed[:4] + [row for row in timed[4:] if "torch" in row["way"]]:
            print(f"  {row['us']:9.2f} us  {row['way']}")
        for row in rows:
            if "us" not in row:
                print(f"  FAILED {row}")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "--compile":
        compile_part(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(sys.argv[1])
