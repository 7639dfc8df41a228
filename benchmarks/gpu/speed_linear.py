"""nf4_linear and its gradient on a GPU beside dense layers and bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import cases, peers
from benchmarks.gpu.cases import Case
from benchmarks.gpu.checks_large import dense_of, within
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Contender, paired
from benchmarks.gpu.weights import dense_copies, make_weight, nested_of, nf4_copies
from feinwerk import NF4Weight, nf4_linear_backward


def decode(device: Device, case: Case) -> dict[str, Any]:
    """Few rows: the weight's bytes are the time."""
    return product(device, case)


def middle(device: Device, case: Case) -> dict[str, Any]:
    """Rows between."""
    return product(device, case)


def large(device: Device, case: Case) -> dict[str, Any]:
    """Many rows: the tensor cores are the time."""
    return product(device, case)


def gradient(weight: NF4Weight, dy: torch.Tensor) -> torch.Tensor:
    """DX of a frozen layer."""
    N, K = weight.shape
    return nf4_linear_backward(
        dy, weight.packed, weight.absmax, *nested_of(weight), N=N, K=K, blocksize=weight.blocksize
    )


def product(device: Device, case: Case) -> dict[str, Any]:
    """Check and time one product; a record for the results file."""
    N, K, M = case.sizes(device.dry)
    backward = case.what == "dX"
    with device.backend(), torch.no_grad():
        weight = make_weight(device.torch, N, K)
        weights = nf4_copies(device, weight)
        W = dense_of(weight, torch.bfloat16)
        # F.linear takes the weight as [out, in]: for dX that is the transposed view.
        denses = [w.t() if backward else w for w in dense_copies(device, W)]
        x = torch.randn(M, N if backward else K, device=device.torch).to(torch.bfloat16)
        if backward:
            calls = [lambda w=w: gradient(w, x) for w in weights]
        else:
            calls = [lambda w=w: w.linear(x) for w in weights]
        ours = Contender("feinwerk", calls)
        result = calls[0]()
        within(result, x, denses[0])
        missing: dict[str, str] = {}
        others = peers.timed(
            missing, case.wants(cases.DENSE), lambda: peers.dense(cases.DENSE, x, denses),
            cases.DENSE,
        )  # fmt: skip
        others += peers.timed(
            missing, case.wants(cases.UNFUSED), lambda: peers.unfused(cases.UNFUSED, x, weights),
            cases.UNFUSED,
        )  # fmt: skip
        others += peers.timed(
            missing, case.wants(cases.BNB),
            lambda: peers.bnb_linear(cases.BNB, x, weights, result), cases.BNB,
        )  # fmt: skip
        workspace = device.extra_bytes(calls[0])
        record = paired(device, ours, *others)
    size = x.element_size()
    return record | {
        "missing": missing,
        "workspace_bytes": workspace,
        "bytes": weight.nbytes + size * M * (N + K),
        "operations": 2 * M * N * K,
        "copies": len(weights),
    }
