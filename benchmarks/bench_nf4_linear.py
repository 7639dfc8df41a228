"""nf4_linear, forward and dX, beside dense, bitsandbytes and ONNX Runtime."""

from __future__ import annotations

import torch

from benchmarks import machine, peers, plan
from benchmarks.problem import DTYPES, Problem, check, ours

OP = "nf4_linear"
MEMORY_ROWS = 4  # up to here memory is the limit, above arithmetic


def bench_nf4_linear(case: plan.Case, compare, session) -> None:
    problem = Problem(
        case.N,
        case.K,
        case.M,
        DTYPES[case.dtype],
        backward=case.what == "dX",
        cold=case.cold,
        cache_bytes=machine.cache_bytes(),
    )
    compute = "int8" if case.what == "int8 forward" else "exact"
    candidate = ours(problem, compute)
    check(problem, candidate, compute)
    found, missing = peers.linear_peers(problem, case.what, case.peers == "few")
    reads, writes = problem.traffic
    threads = torch.get_num_threads()
    limits = []
    if case.bar and case.M <= MEMORY_ROWS:
        limits = [machine.memory_limit(reads, writes, threads, case.cold)]
    elif case.bar:
        units = machine.units(session.isa, problem.dtype)
        limits = [machine.arithmetic_limit(u, problem.operations, threads) for u in units]
    compare(
        case,
        candidate,
        found,
        missing,
        read_bytes=reads,
        write_bytes=writes,
        operations=problem.operations,
        limits=limits,
    )
