"""Times of AdamW steps on one GPU, in turn with torch's fused one, for optim_check."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from feinwerk import square_sum
from feinwerk.optim import AdamW

GPU = torch.device("cuda")
SETS: dict[str, list[tuple[int, int]]] = {
    "one of 100 M": [(24576, 4096)],
    "64 of 1.5 M": [(1536, 1024)] * 64,
    "448 adapters": [(16, 4096), (4096, 16)] * 224,
}
# Bytes that a step must move for each parameter: all that it reads and writes.
TORCH = "torch fused, fp32"
CONTENDERS: dict[str, tuple[float, torch.dtype, dict[str, Any]]] = {
    TORCH: (28, torch.float32, {}),
    "32-bit": (28, torch.float32, {"state_bits": 32}),
    "8-bit": (16 + 16 / 256, torch.float32, {"state_bits": 8}),
    "8-bit, bf16 + remainder": (14 + 16 / 256, torch.bfloat16, {"state_bits": 8}),
    "8-bit, bf16 stochastic": (
        10 + 16 / 256, torch.bfloat16, {"state_bits": 8, "bf16_params": "stochastic"},
    ),
}  # fmt: skip
ROUNDS = 9
# Warps of other programs than the ones chosen.
OTHER_PROGRAMS = (4, 8, 16)


def elapsed(steps: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each, by events, in turn."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for times, step in zip(found, steps, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / repeats)
    return found


def copied() -> float:
    """GB/s of a copy of 1 GiB, reads and writes counted."""
    source = torch.empty(2**28, device=GPU).normal_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    (times,) = elapsed([lambda: target.copy_(source)], 3)
    return 2 * source.nbytes / statistics.median(times) / 1e6


def optimizer(name: str, shapes: list[tuple[int, int]]) -> Any:
    """A contender with its gradients, a few steps into training."""
    _, dtype, options = CONTENDERS[name]
    params = [torch.nn.Parameter(torch.randn(s, device=GPU).to(dtype)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    if name == TORCH:
        made: Any = torch.optim.AdamW(params, lr=1e-4, fused=True)
    else:
        made = AdamW(params, lr=1e-4, **options)
    for _ in range(3):
        made.step()
    return made


def host_time(step: Callable[[], Any]) -> float:
    """Milliseconds until a step has been handed to the GPU."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure_set(shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Every contender, each in turn with torch's; memory holds two at a time."""
    count = sum(rows * columns for rows, columns in shapes)
    records: dict[str, Any] = {}
    peer = optimizer(TORCH, shapes)
    for name, (width, _, _) in CONTENDERS.items():
        if name == TORCH:
            continue
        ours = optimizer(name, shapes)
        theirs_ms, ours_ms = elapsed([peer.step, ours.step], 2)
        median = statistics.median(ours_ms)
        records[name] = {
            "ms": median,
            "all_ms": ours_ms,
            "gb_s": width * count / median / 1e6,
            "host_ms": host_time(ours.step),
            "torch_ms": statistics.median(theirs_ms),
            "ratio": statistics.median(t / o for t, o in zip(theirs_ms, ours_ms, strict=True)),
        }
        records[TORCH] = {
            "ms": records[name]["torch_ms"],
            "gb_s": 28 * count / records[name]["torch_ms"] / 1e6,
            "host_ms": host_time(peer.step),
        }
        del ours
        gc.collect()
    grads = [param.grad for param in peer.param_groups[0]["params"]]
    square_sum(grads)
    (times,) = elapsed([lambda: square_sum(grads)], 2)
    median = statistics.median(times)
    records["square_sum"] = {"ms": median, "gb_s": 4 * count / median / 1e6}
    return records


def other_tiles(end: float) -> dict[str, float]:
    """Milliseconds of the 8-bit step over 100 M parameters with other programs."""
    module: Any = importlib.import_module("feinwerk.ops.adamw_step.triton")
    choose, found = module.choose, dict[str, float]()
    for name in ("8-bit", "8-bit, bf16 + remainder", "8-bit, bf16 stochastic"):
        ours = optimizer(name, SETS["one of 100 M"])
        for warps in OTHER_PROGRAMS:
            if time.monotonic() > end:
                return found
            choice = module.Choice(256 * warps, 256 * warps, 2048, 4, warps, 64)
            module.choose = lambda gpu, choice=choice: choice
            try:
                ours.step()
                (times,) = elapsed([ours.step], 2)
                found[f"{name}, {warps} warps"] = statistics.median(times)
            finally:
                module.choose = choose
        del ours
        gc.collect()
    return found


def measure(seconds: float) -> dict[str, Any]:
    """All sets while there is time, then other programs."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"copy_gb_s": copied(), "sets": {}, "tiles": {}}
    for name, shapes in SETS.items():
        if time.monotonic() > end:
            break
        result["sets"][name] = measure_set(shapes)
        gc.collect()
        torch.cuda.empty_cache()
    result["tiles"] = other_tiles(end)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """A line for each contender of each set."""
    copy = result["copy_gb_s"]
    lines = [
        f"copy {copy:.0f} GB/s",
        f"{'':<40}{'ms':>9}{'GB/s':>7}{'copy':>6}{'torch':>7}{'host':>8}",
    ]
    for name, records in result["sets"].items():
        for contender, record in records.items():
            ratio = f"{record['ratio']:.2f}x" if "ratio" in record else ""
            host = f"{record['host_ms']:.2f}" if "host_ms" in record else ""
            share = 100 * record["gb_s"] / copy
            lines.append(
                f"{name + ', ' + contender:<40}{record['ms']:>9.3f}{record['gb_s']:>7.0f}"
                f"{share:>5.0f}%{ratio:>7}{host:>8}"
            )
    lines += [f"{name}: {ms:.3f} ms" for name, ms in result["tiles"].items()]
    return lines
