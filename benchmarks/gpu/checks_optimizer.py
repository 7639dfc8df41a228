"""Checks of adamw_step with every kind of state and parameter, and of square_sum: exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.checks_weights import short
from benchmarks.gpu.correctness import Check, Results, compared, exact, moved, on_host
from feinwerk import square_sum
from feinwerk.testing import DTYPES
from feinwerk.testing.adamw import MASTERS, STATE_DTYPES, StepCase, make_step

SHAPES = ((), (1,), (7,), (33, 97), (3, 4, 50), (300, 16), (300, 520), (1024, 768))
TINY = ((), (7,), (3, 40))
STEPS = 3


def optimizer(tiny: bool) -> list[Check]:
    """Every check of this group."""
    return [*_steps(tiny), *_sums(tiny)]


def _steps(tiny: bool) -> Iterator[Check]:
    shapes = TINY if tiny else SHAPES
    for i, master in enumerate(MASTERS):
        for j, states in enumerate(STATE_DTYPES):
            grads = DTYPES[(i + j) % 3]
            name = f"{master} parameters, {short(states)} states, {short(grads)} gradients"
            case = make_step(shapes, master=master, grads=grads, states=states, seed=i + j)
            yield _stepped(name, case)
    for states in STATE_DTYPES:
        case = make_step(shapes, states=states, seed=7)
        changes = {
            "clip_coef": torch.tensor(0.25), "grad_scale": torch.tensor(8.0), "maximize": True,
        }  # fmt: skip
        yield _stepped(f"clipped, scaled and ascending, {short(states)} states", case, **changes)
        skipped = {"found_inf": torch.tensor(1.0)}
        yield _stepped(f"left out, {short(states)} states", case, **skipped)
    odd = make_step(shapes, states=torch.uint8, blocksize=100, seed=8)
    yield _stepped("blocks of 100", odd)
    # Moments beyond the fast quotient's range in some blocks, beside others in the same thread.
    coded = make_step(shapes, states=torch.uint8, seed=10)
    yield _stepped("huge gradients", coded, huge=1e18)


def case_on(case: StepCase, device: torch.device) -> StepCase:
    """The same call with its tensors on a device."""
    tensors = moved(case.tensors, device)
    return dataclasses.replace(case, **tensors, options=moved(case.options, device))


def _stepped(name: str, case: StepCase, huge: float = 1.0, **changes: Any) -> Check:
    """Some steps in a row, with new gradients for each; every tensor that they write.

    Every seventh gradient is `huge` times as large.
    """

    def actual(device: torch.device) -> Results:
        host, there = case.copy(), case_on(case, device)
        given = moved(changes, device)
        for step in range(STEPS):
            there.step(**given)
            host.advance(step)
            for grad in host.grads:
                grad.view(-1)[::7].mul_(huge)
            there.options["steps"] = list(host.options["steps"])
            for mine, theirs in zip(there.grads, host.grads, strict=True):
                mine.copy_(theirs)
        return {f"{k}[{i}]": t for k, ts in there.tensors.items() for i, t in enumerate(ts)}

    return Check("adamw_step", name, actual, exact(lambda: on_host(actual(torch.device("cpu")))))


def _sums(tiny: bool) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        tensors = []
        for shape in TINY if tiny else (*SHAPES, (0, 5), (5, 0)):
            size = (torch.randn(shape, generator=generator) * 8).clamp(-60, 60).exp()
            tensors.append((torch.randn(shape, generator=generator) * size).to(dtype))
        yield compared(
            "square_sum", f"many shapes, {short(dtype)}", square_sum, tensors, outputs=("limbs",)
        )
    broken = torch.ones(4, 6)
    broken[1, 2], broken[2, 3] = torch.inf, torch.nan
    yield compared("square_sum", "infinity and NaN", square_sum, [broken], outputs=("limbs",))
