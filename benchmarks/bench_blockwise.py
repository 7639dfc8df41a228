"""blockwise_quantize and blockwise_dequantize, the second level of double quantization."""

from __future__ import annotations

import functools

import torch

import feinwerk
from benchmarks import peers, plan
from benchmarks.harness import Candidate
from feinwerk import testing
from feinwerk.codebook import dynamic_map

OP = "blockwise"


def bnb_centered(x: torch.Tensor) -> Candidate:
    """quantize_blockwise of x - mean, as quantize_4bit does with its absmax."""
    functional = peers.optional("bitsandbytes.functional")

    def call() -> object:
        offset = x.mean()
        return functional.quantize_blockwise(x - offset, blocksize=256), offset

    return Candidate("bitsandbytes", [call])


def bnb_restore(x: torch.Tensor) -> Candidate:
    """dequantize_blockwise plus the offset."""
    functional = peers.optional("bitsandbytes.functional")
    offset = x.mean()
    codes, state = functional.quantize_blockwise(x - offset, blocksize=256)

    def call() -> torch.Tensor:
        return functional.dequantize_blockwise(codes, state) + offset

    return peers.sane(Candidate("bitsandbytes", [call]), call(), x)


def bench_blockwise(case: plan.Case, compare) -> None:
    x = torch.rand(case.N, generator=torch.Generator().manual_seed(0)) + 0.5
    codebook = dynamic_map()
    quantize = functools.partial(feinwerk.blockwise_quantize, x, codebook, center=True)
    codes, absmax, offset = quantize()
    restore = functools.partial(feinwerk.blockwise_dequantize, codes, absmax, codebook, offset)
    call = quantize if case.what.startswith("quantize") else restore
    with testing.use_backend("reference"):
        expected = call()
    results = call()
    pairs = [(results, expected)] if call is restore else zip(results, expected, strict=True)
    for mine, law in pairs:
        testing.assert_same_bits(mine, law, case.what)
    peer = bnb_centered if call is quantize else bnb_restore
    found, missing = peers.build([functools.partial(peer, x)])
    small, large = codes.nbytes + absmax.nbytes, x.nbytes
    reads, writes = (large, small) if call is quantize else (small, large)
    ours = Candidate("feinwerk", [call])
    compare(case, ours, found, missing, read_bytes=reads, write_bytes=writes)
