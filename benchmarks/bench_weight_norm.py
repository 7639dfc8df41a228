"""weight_norm, DoRA's row norms of W + scaling B A, beside PEFT's way to them."""

from __future__ import annotations

import functools

import torch

from benchmarks import adapters, machine, peers, peft_peers, plan
from benchmarks.adapters import BLOCKSIZE, RANK, SCALING, AdapterProblem
from benchmarks.harness import Candidate, copies_beyond_cache
from benchmarks.problem import copy_of, dense_weight, nf4_weight
from feinwerk import ops

OP = "weight_norm"


def bench_weight_norm(case: plan.Case, compare) -> None:
    problem = AdapterProblem(case.N, case.K, 1, torch.float32, dora=True)
    (adapter,) = problem.adapters()
    if case.what == "norm over NF4":
        weight = nf4_weight(case.N, case.K, BLOCKSIZE)
        copies = copies_beyond_cache(weight.nbytes, machine.cache_bytes())
        held = [adapters.tables(copy_of(weight)) for _ in range(copies)]
        W, nbytes = weight.dequantize(torch.float32), weight.nbytes
        base = peft_peers.linear4bit(case.N, case.K, torch.float32)
    else:
        W = dense_weight(case.N, case.K)
        nbytes = W.nbytes
        copies = copies_beyond_cache(nbytes, machine.cache_bytes())
        held = [(W.clone(), None, None, None, None) for _ in range(copies)]
        base = torch.nn.Linear(case.K, case.N, bias=False)
        base.weight = torch.nn.Parameter(W.clone(), requires_grad=False)
    norm = ops.row_norms(*held[0], shape=(case.N, case.K), blocksize=BLOCKSIZE)
    fixed = {"scaling": SCALING, "base_norm": norm, "blocksize": BLOCKSIZE}
    calls = [
        functools.partial(ops.weight_norm, weight, adapter.A, adapter.B, *rest, **fixed)
        for weight, *rest in held
    ]
    expected = calls[0]()
    truth = true_norm(W.double(), adapter)
    adapters.compare_norms(
        "norm", expected, truth, true_norm(W, adapter), truth, depth=case.K + RANK
    )
    found, missing = peers.build(
        [functools.partial(peft_peers.weight_norm, base, adapter, expected)]
    )
    compare(
        case,
        Candidate("feinwerk", calls),
        found,
        missing,
        read_bytes=nbytes + adapter.A.nbytes + adapter.B.nbytes + norm.nbytes,
        write_bytes=expected.nbytes,
        operations=2.0 * RANK * case.N * case.K,
    )


def true_norm(W: torch.Tensor, adapter: adapters.Adapter) -> torch.Tensor:
    """The definition, in the arithmetic of W."""
    A, B = adapter.A.detach().to(W.dtype), adapter.B.detach().to(W.dtype)
    return torch.linalg.norm(W + SCALING * B @ A, dim=1)
