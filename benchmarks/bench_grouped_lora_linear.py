"""Many adapters in one batch, beside PEFT's mixed batch and beside one run for each of them."""

from __future__ import annotations

import functools

import torch

from benchmarks import adapters, machine, peers, peft_peers, plan
from benchmarks.adapters import AdapterProblem
from benchmarks.harness import Candidate
from benchmarks.problem import DTYPES, copy_of, nf4_weight

OP = "grouped_lora_linear"


def one_by_one(problem: AdapterProblem) -> Candidate:
    """Our lora_linear, a step for each adapter in turn."""
    weight = copy_of(nf4_weight(problem.N, problem.K, adapters.BLOCKSIZE))
    x, dy = problem.x(), problem.grad_y()
    runs = []
    for i in range(problem.count):
        layer, trained = adapters.layer_of(problem.alone(), weight)
        leaf = x[i].clone().requires_grad_()
        runs.append(functools.partial(adapters.step, layer, leaf, dy[i], trained))

    def call() -> list[tuple[torch.Tensor, ...]]:
        return [run() for run in runs]

    return Candidate("feinwerk, one by one", [call])


def bench_grouped_lora_linear(case: plan.Case, compare) -> None:
    problem = AdapterProblem(
        case.N,
        case.K,
        case.M,
        DTYPES[case.dtype],
        backward=case.what == adapters.STEP,
        count=plan.ADAPTERS,
        cold=case.cold,
        cache_bytes=machine.cache_bytes(),
    )
    ours = adapters.ours(problem)
    results = ours.calls[0]()
    adapters.check(problem, results)
    peer = peft_peers.one_by_one if problem.backward else peft_peers.mixed_batch
    found, missing = peers.build([functools.partial(peer, problem, results)])
    if problem.backward:
        found.append(one_by_one(problem))
    reads, writes = problem.traffic
    compare(
        case,
        ours,
        [adapters.nf4_alone(problem), *found],
        missing,
        read_bytes=reads,
        write_bytes=writes,
        operations=problem.operations,
    )
