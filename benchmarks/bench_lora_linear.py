"""LoRA and DoRA over NF4 beside PEFT + bitsandbytes, and beside what they add something to."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks import adapters, machine, peers, peft_peers, plan
from benchmarks.adapters import AdapterProblem
from benchmarks.harness import Candidate
from benchmarks.problem import DTYPES

OP = "lora_linear"


def lesser(problem: AdapterProblem) -> Candidate:
    """What the bars hold ours against: LoRA beside DoRA, the layer without adapter beside LoRA."""
    if not problem.dora:
        return adapters.nf4_alone(problem)
    candidate = adapters.ours(dataclasses.replace(problem, dora=False))
    candidate.name = "feinwerk LoRA"
    return candidate


def bench_lora_linear(case: plan.Case, compare) -> None:
    method, _, what = case.what.partition(" ")
    problem = AdapterProblem(
        case.N,
        case.K,
        case.M,
        DTYPES[case.dtype],
        dora=method == "DoRA",
        backward=what == adapters.STEP,
        cold=case.cold,
        cache_bytes=machine.cache_bytes(),
    )
    ours = adapters.ours(problem)
    results = ours.calls[0]()
    adapters.check(problem, results)
    factories = [functools.partial(peft_peers.layer, problem, results)]
    if problem.backward and case.dtype == "bf16":
        factories.append(functools.partial(peft_peers.layer, problem, results, half=True))
    found, missing = peers.build(factories)
    reads, writes = problem.traffic
    compare(
        case,
        ours,
        [lesser(problem), *found],
        missing,
        read_bytes=reads,
        write_bytes=writes,
        operations=problem.operations,
    )
