"""nf4_quantize with double quantization beside bitsandbytes.quantize_4bit."""

from __future__ import annotations

import functools

import torch

import feinwerk
from benchmarks import machine, peers, plan
from benchmarks.harness import Candidate, copies_beyond_cache
from benchmarks.problem import DTYPES, dense_weight
from feinwerk import testing
from feinwerk.codebook import dynamic_map

OP = "nf4_quantize"
BLOCKSIZE = 64


def quantize(weight: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both levels: packed, codes of absmax, nested_absmax, nested_offset."""
    packed, absmax = feinwerk.nf4_quantize(weight, blocksize=BLOCKSIZE)
    return packed, *feinwerk.blockwise_quantize(absmax, codebook, center=True)


def bench_nf4_quantize(case: plan.Case, compare) -> None:
    weight = dense_weight(case.N, case.K).to(DTYPES[case.dtype])
    copies = copies_beyond_cache(weight.nbytes, machine.cache_bytes())
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    codebook = dynamic_map()
    head = weight[: max(1, min(64, case.N))]
    with testing.use_backend("reference"):
        expected = quantize(head, codebook)
    for name, mine, law in zip(("packed", "codes", "absmax", "offset"), quantize(head, codebook),
                               expected, strict=True):  # fmt: skip
        testing.assert_same_bits(mine, law, name)
    ours = Candidate("feinwerk", [functools.partial(quantize, w, codebook) for w in weights])
    whole = Candidate(
        "NF4Weight.from_dense",
        [functools.partial(feinwerk.NF4Weight.from_dense, w) for w in weights],
    )
    found, missing = peers.build([functools.partial(peers.bnb_quantize, weights)])
    results = ours.calls[0]()
    writes = sum(tensor.nbytes for tensor in results)
    compare(
        case,
        ours,
        [*found, whole],
        missing,
        read_bytes=weight.nbytes,
        write_bytes=writes,
        limits=[machine.memory_limit(weight.nbytes, writes, torch.get_num_threads())],
    )
