"""What the GPU can do at most: measured copy bandwidth and bf16 matmul rate, with its clocks."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.device import Device, smi
from benchmarks.gpu.timing import Contender, prepare, times

# The largest is not the fastest everywhere: what any of them reaches, memory can do.
COPY_BYTES = (128 << 20, 256 << 20, 2 << 30)
SIZE = 8192
SAMPLES = 15


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
        taken = samples(device, Contender("copy", calls))
        rate = 2 * count / taken["us"] * 1e-3
        if rate > found["copy_gbps"]:
            found = {"copy_gbps": rate, "copy_us": taken, "copy_bytes": count}
    return found


def matmul_rate(device: Device) -> dict[str, Any]:
    """TFLOP/s of a large bf16 product; ones or zeros would run faster."""
    size = 64 if device.dry else SIZE
    a, b = (torch.randn(size, size, device=device.torch).to(torch.bfloat16) for _ in range(2))
    taken = samples(device, Contender("matmul", [lambda: torch.mm(a, b)]))
    return {"matmul_tflops": 2 * size**3 / taken["us"] * 1e-6, "matmul_us": taken}


def samples(device: Device, contender: Contender) -> dict[str, float]:
    """Times of one contender alone, in microseconds."""
    ready = prepare(device, contender)
    taken = []
    for _ in range(3 if device.dry else SAMPLES):
        begin, end = device.event(), device.event()
        device.head_start(2 * ready.host_seconds + 1e-4)
        begin.record()
        ready.run()
        end.record()
        device.synchronize()
        taken.append(1e-3 * begin.elapsed_time(end) / ready.count)
    return times(taken)
