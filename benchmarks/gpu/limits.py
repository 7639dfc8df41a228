"""What the GPU can do at most: measured copy bandwidth and bf16 matmul rate, with its clocks."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.device import Device, smi
from benchmarks.gpu.timing import Contender, alone

# The largest is not the fastest everywhere: what any of them reaches, memory can do.
COPY_BYTES = (128 << 20, 256 << 20, 2 << 30)
SIZE = 8192


def measure(device: Device) -> dict[str, Any]:
    """Medians of a large copy (bytes read and written) and of a matmul of random numbers."""
    found: dict[str, Any] = {"before": smi()}
    found |= copy_rate(device)
    device.release()
    found |= matmul_rate(device)
    return found | {"after": smi()}


def copy_rate(device: Device) -> dict[str, Any]:
    """GB/s of the fastest of some copies that no cache helps."""
    found: dict[str, Any] = {"copy_gbps": 0.0}
    for count in (4096,) if device.dry else COPY_BYTES:
        pairs = []
        for _ in range(max(1, min(4, COPY_BYTES[-1] // 2 // count))):  # more than the L2 cache
            source = torch.empty(count, dtype=torch.uint8, device=device.torch).random_(0, 256)
            pairs.append((torch.empty_like(source), source))
        calls = [lambda t=target, s=source: t.copy_(s) for target, source in pairs]
        taken = alone(device, Contender("copy", calls))
        rate = 2 * count / taken["us"] * 1e-3
        if rate > found["copy_gbps"]:
            found = {"copy_gbps": rate, "copy_us": taken, "copy_bytes": count}
    return found


def matmul_rate(device: Device) -> dict[str, Any]:
    """TFLOP/s of a large bf16 product; ones or zeros would run faster."""
    size = 64 if device.dry else SIZE
    a, b = (torch.randn(size, size, device=device.torch).to(torch.bfloat16) for _ in range(2))
    taken = alone(device, Contender("matmul", [lambda: torch.mm(a, b)]))
    return {"matmul_tflops": 2 * size**3 / taken["us"] * 1e-6, "matmul_us": taken}
