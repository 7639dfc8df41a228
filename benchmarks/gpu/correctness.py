"""What a check of correctness is, how it is run, and the groups that run in a process each.

A check computes results on the device and judges them against a reference on the CPU or in fp64 by
the budgets of feinwerk.testing. Every check computes twice, into poisoned memory: both runs must
have the same bits.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.device import Device
from feinwerk import testing
from feinwerk.testing.poison import poisoned

Results = dict[str, torch.Tensor]

# Group: the module that holds its checks. Each group is a process, and all run at the same time:
# most of their time is the compilation of kernels. Those that compile most are dealt to two.
GROUPS = {
    "quantize": "benchmarks.gpu.checks_weights",
    "dequantize": "benchmarks.gpu.checks_weights",
    "linear-1": "benchmarks.gpu.checks_linear",
    "linear-2": "benchmarks.gpu.checks_linear",
    "backward": "benchmarks.gpu.checks_linear",
    "lora-1": "benchmarks.gpu.checks_adapters",
    "lora-2": "benchmarks.gpu.checks_adapters",
    "dora-1": "benchmarks.gpu.checks_adapters",
    "dora-2": "benchmarks.gpu.checks_adapters",
    "norm": "benchmarks.gpu.checks_adapters",
    "grouped": "benchmarks.gpu.checks_adapters",
    "optimizer": "benchmarks.gpu.checks_optimizer",
    "large": "benchmarks.gpu.checks_large",
}


@dataclass(frozen=True)
class Check:
    """One property of one op.

    Args:
        op: the op's registered name.
        name: what is looked at, unique for the op.
        actual: computes the results on a device, by name.
        judge: raises AssertionError unless they are right; takes them as `actual` left them.
        poison: fill what feinwerk allocates with NaN first.
        twice: compute twice and compare the bits.
    """

    op: str
    name: str
    actual: Callable[[torch.device], Results]
    judge: Callable[[Results], None]
    poison: bool = True
    twice: bool = True

    @property
    def key(self) -> str:
        """The check's name in the results file."""
        return f"{self.op}: {self.name}"


def checks_of(group: str, tiny: bool) -> list[Check]:
    """The checks of a group; `tiny` ones are for dry runs, same code at small sizes."""
    name, _, half = group.partition("-")
    found: list[Check] = getattr(importlib.import_module(GROUPS[group]), name)(tiny)
    return found[int(half) - 1 :: 2] if half else found


def run(check: Check, device: Device) -> None:
    """Compute and judge; raises AssertionError, or whatever the op raises."""
    poison = poisoned() if check.poison else contextlib.nullcontext()
    with device.backend(), poison:
        got = check.actual(device.torch)
        again = check.actual(device.torch) if check.twice else got
        device.synchronize()
    check.judge(got)
    for name, value in got.items():
        testing.assert_same_bits(again[name], value, f"{name}, second run")


def on_host(results: Results) -> Results:
    """The same results on the CPU."""
    return {name: value.cpu() for name, value in results.items()}


def exact(expected: Callable[[], Results]) -> Callable[[Results], None]:
    """A judge: the bits of the reference, run on CPU tensors."""

    def judge(results: Results) -> None:
        with testing.use_backend("reference"):
            want = expected()
        got = on_host(results)
        if got.keys() != want.keys():
            raise AssertionError(f"results: expected {sorted(want)}, got {sorted(got)}")
        for name, value in want.items():
            testing.assert_same_bits(got[name], value, name)

    return judge


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, also in lists, tuples and dicts, on the device; copies where they are there."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


def compared(
    op: str, name: str, call: Callable[..., Any], *args: Any, outputs: tuple[str, ...] = ("out",),
    **options: Any,
) -> Check:  # fmt: skip
    """A check of an exact op: the same call on the device and, by the reference, on the CPU."""

    def results(device: torch.device) -> Results:
        out = call(*moved(args, device), **moved(options, device))
        found = out if isinstance(out, tuple) else (out,)
        return dict(zip(outputs, found, strict=True))

    return Check(
        op, name, results, exact(lambda: on_host(results(torch.device("cpu"))))
    )  # fmt: skip
