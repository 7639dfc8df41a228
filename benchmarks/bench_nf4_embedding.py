"""nf4_embedding beside a dense embedding and bitsandbytes' 4-bit one."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

import feinwerk
from benchmarks import machine, peers, plan
from benchmarks.harness import Candidate
from benchmarks.problem import DTYPES, copy_of, dense_weight, nf4_weight
from feinwerk import testing

OP = "nf4_embedding"


def bnb_embedding(weight: feinwerk.NF4Weight, indices: torch.Tensor, copies: int) -> Candidate:
    """bitsandbytes.nn.Embedding4bit, NF4, on the same bytes."""
    bnb = peers.optional("bitsandbytes")
    N, K = weight.shape
    packed, state = peers.quant_state(weight)
    calls = []
    for _ in range(copies):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = bnb.nn.Embedding4bit(N, K, dtype=weight.dtype, quant_type="nf4", device="meta")
        module.weight = bnb.nn.Params4bit(
            packed.clone(), requires_grad=False, quant_state=state, bnb_quantized=True,
            quant_type="nf4", module=module,
        )  # fmt: skip
        calls.append(functools.partial(module, indices))
    return peers.sane(Candidate("bitsandbytes", calls), calls[0](), weight.embedding(indices))


def bench_nf4_embedding(case: plan.Case, compare) -> None:
    dtype = DTYPES[case.dtype]
    weight = nf4_weight(case.N, case.K).to(dtype=dtype)
    generator = torch.Generator().manual_seed(case.M)
    indices = torch.randint(case.N, (case.M,), generator=generator)
    with testing.use_backend("reference"):
        expected = weight.embedding(indices[:32])
    testing.assert_same_bits(weight.embedding(indices[:32]), expected, "rows")
    copies = min(8, max(1, machine.cache_bytes() // weight.nbytes))
    dense = dense_weight(case.N, case.K).to(dtype)
    ours = Candidate(
        "feinwerk", [functools.partial(copy_of(weight).embedding, indices) for _ in range(copies)]
    )
    table = Candidate("dense", [functools.partial(F.embedding, indices, dense)])
    found, missing = peers.build([functools.partial(bnb_embedding, weight, indices, copies)])
    row = weight.nbytes * case.M // case.N
    compare(
        case,
        ours,
        [table, *found],
        missing,
        read_bytes=row,
        write_bytes=case.M * case.K * dtype.itemsize,
    )
