"""Quantize, dequantize and look-ups on a GPU, against the bytes that they have to move."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu import cases, peers
from benchmarks.gpu.cases import Case
from benchmarks.gpu.checks_large import dense_of
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Contender, copies, paired
from benchmarks.gpu.weights import dense_copies, make_weight, nf4_copies
from feinwerk import blockwise_dequantize, blockwise_quantize, nf4_quantize, testing
from feinwerk.codebook import dynamic_map

HALF = torch.bfloat16


def memory(device: Device, case: Case) -> dict[str, Any]:
    """Check and time one case; a record for the results file."""
    measure = {
        "nf4_dequantize": dequantize,
        "nf4_quantize": quantize,
        "nf4_embedding": embedding,
        "blockwise_quantize": codes,
        "blockwise_dequantize": values,
    }[case.op]
    with device.backend(), torch.no_grad():
        return measure(device, case)


def dequantize(device: Device, case: Case) -> dict[str, Any]:
    """A weight to bf16, double-quantized."""
    N, K, _ = case.sizes(device.dry)
    weights = nf4_copies(device, make_weight(device.torch, N, K))
    ours = Contender("feinwerk", [functools.partial(w.dequantize, HALF) for w in weights])
    expected = dense_of(weights[0], HALF)
    testing.assert_same_bits(weights[0].dequantize(HALF), expected)
    missing: dict[str, str] = {}
    others = peers.timed(
        missing, case.wants(cases.BNB),
        lambda: peers.bnb_dequantize(cases.BNB, weights, expected), cases.BNB,
    )  # fmt: skip
    record = paired(device, ours, *others)
    return record | {"missing": missing, "bytes": weights[0].nbytes + 2 * N * K}


def quantize(device: Device, case: Case) -> dict[str, Any]:
    """A bf16 weight to codes and absmax; the test for NaN, which waits for the device, left out."""
    N, K, _ = case.sizes(device.dry)
    dense = dense_copies(device, torch.randn(N, K, device=device.torch).to(HALF))
    call = functools.partial(nf4_quantize, blocksize=64, rule="cuda", allow_non_finite=True)
    ours = Contender("feinwerk", [functools.partial(call, w) for w in dense])
    with testing.use_backend("reference"):
        expected = call(dense[0])
    for name, mine, theirs in zip(("packed", "absmax"), call(dense[0]), expected, strict=True):
        testing.assert_same_bits(mine, theirs, name)
    missing: dict[str, str] = {}
    others = peers.timed(
        missing, case.wants(cases.BNB), lambda: peers.bnb_quantize(cases.BNB, dense), cases.BNB
    )
    record = paired(device, ours, *others)
    return record | {"missing": missing, "bytes": 2 * N * K + N * K // 2 + 4 * N * K // 64}


def embedding(device: Device, case: Case) -> dict[str, Any]:
    """Random rows of a table."""
    N, K, M = case.sizes(device.dry)
    table = make_weight(device.torch, N, K)
    row = table.nbytes / N
    count = copies(device, int(M * row))
    rows = [torch.randint(0, N, (M,), device=device.torch) for _ in range(count)]
    ours = Contender("feinwerk", [functools.partial(table.embedding, r) for r in rows])
    testing.assert_same_bits(table.embedding(rows[0]), dense_of(table, HALF)[rows[0]])
    record = paired(device, ours)
    return record | {"missing": {}, "bytes": int(M * row) + 2 * M * K + 8 * M}


def codes(device: Device, case: Case) -> dict[str, Any]:
    """fp32 values to 8-bit codes in blocks of 256, the exact nearest."""
    x, codebook = _values(device, case)
    call = functools.partial(blockwise_quantize, codebook=codebook, rule="cuda")
    ours = Contender("feinwerk", [functools.partial(call, x), functools.partial(call, x.clone())])
    record = paired(device, ours)
    return record | {"missing": {}, "bytes": 5 * x.numel() + 4 * x.numel() // 256}


def values(device: Device, case: Case) -> dict[str, Any]:
    """8-bit codes in blocks of 256 back to fp32."""
    x, codebook = _values(device, case)
    found, absmax, _ = blockwise_quantize(x, codebook, rule="cuda")
    call = functools.partial(blockwise_dequantize, absmax=absmax, codebook=codebook)
    calls = [functools.partial(call, found), functools.partial(call, found.clone())]
    record = paired(device, Contender("feinwerk", calls))
    return record | {"missing": {}, "bytes": 5 * x.numel() + 4 * x.numel() // 256}


def _values(device: Device, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    count = 1000 if device.dry else case.N
    return torch.randn(count, device=device.torch), dynamic_map(device=device.torch)
