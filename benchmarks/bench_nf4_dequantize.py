"""nf4_dequantize of a double-quantized weight beside bitsandbytes.dequantize_4bit."""

from __future__ import annotations

import functools

import torch

from benchmarks import machine, peers, plan
from benchmarks.harness import Candidate, copies_beyond_cache
from benchmarks.problem import DTYPES, copy_of, nf4_weight, rounded_weight

OP = "nf4_dequantize"
BLOCKSIZE = 64


def fill(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Only the allocation and the writing: what the fresh pages of any result cost."""
    return torch.empty(shape, dtype=dtype).fill_(1)


def bench_nf4_dequantize(case: plan.Case, compare) -> None:
    dtype = DTYPES[case.dtype]
    weight = nf4_weight(case.N, case.K, BLOCKSIZE)
    rounded_weight(case.N, case.K, BLOCKSIZE, dtype)  # compares with the reference
    writes = case.N * case.K * dtype.itemsize
    copies = copies_beyond_cache(weight.nbytes, machine.cache_bytes())
    ours = Candidate(
        "feinwerk", [functools.partial(copy_of(weight).dequantize, dtype) for _ in range(copies)]
    )
    found, missing = peers.build([functools.partial(peers.bnb_dequantize, weight, dtype, copies)])
    fresh = Candidate("torch fill", [functools.partial(fill, (case.N, case.K), dtype)])
    fresh.note = "allocates and writes a result of this size, nothing else"
    compare(
        case,
        ours,
        [*found, fresh],
        missing,
        read_bytes=weight.nbytes,
        write_bytes=writes,
        limits=[machine.memory_limit(weight.nbytes, writes, torch.get_num_threads())],
    )
