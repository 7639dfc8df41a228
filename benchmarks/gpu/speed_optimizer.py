"""One AdamW step over 100 M parameters on a GPU, beside torch's fused AdamW, and square_sum."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu import cases, peers
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Contender, paired
from feinwerk import square_sum
from feinwerk.testing.adamw import StepCase

TENSORS = 16
BLOCKSIZE = 256
SCALARS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def optimizer(device: Device, case: Case) -> dict[str, Any]:
    """Check and time one case; a record for the results file."""
    shapes = [(3, 300)] * 2 if device.dry else [(4096, case.N // (4096 * TENSORS))] * TENSORS
    count = sum(rows * columns for rows, columns in shapes)
    with device.backend(), torch.no_grad():
        if case.op == "square_sum":
            tensors = [torch.randn(shape, device=device.torch) for shape in shapes]
            record = paired(device, Contender("feinwerk", [lambda: square_sum(tensors)]))
            return record | {"missing": {}, "bytes": 4 * count}
        eight, half = "8-bit" in case.what, "bf16" in case.what
        step = make_step(device, shapes, eight=eight, half=half)
        moves(step)
        missing: dict[str, str] = {}
        others = peers.timed(
            missing, case.wants(cases.FUSED), lambda: fused(cases.FUSED, device, shapes),
            cases.FUSED,
        )  # fmt: skip
        record = paired(device, Contender("feinwerk", [step.step]), *others)
    param, grad = (2, 2) if half else (4, 4)
    state = 2 + 2 * 4 / BLOCKSIZE if eight else 8
    return record | {"missing": missing, "bytes": int(count * (2 * param + grad + 2 * state))}


def make_step(
    device: Device, shapes: list[tuple[int, int]], *, eight: bool, half: bool
) -> StepCase:
    """A step as it is some way into training, made on the device."""
    dtype = torch.bfloat16 if half else torch.float32
    generator = torch.Generator(device.torch).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device.torch)
    tensors: dict[str, list[torch.Tensor]] = {
        "params": [normal(shape).to(dtype) for shape in shapes],
        "grads": [(normal(shape) * 1e-3).to(dtype) for shape in shapes],
        "exp_avg_absmaxes": [], "exp_avg_sq_absmaxes": [], "remainders": [],
    }  # fmt: skip
    for name, zero in (("exp_avgs", 127), ("exp_avg_sqs", 0)):
        kind = torch.uint8 if eight else torch.float32
        fill = zero if eight else 0
        tensors[name] = [
            torch.full(shape, fill, dtype=kind, device=device.torch) for shape in shapes
        ]
    if eight:
        for name in ("exp_avg_absmaxes", "exp_avg_sq_absmaxes"):
            tensors[name] = [
                torch.zeros(rows, -(-columns // BLOCKSIZE), device=device.torch)
                for rows, columns in shapes
            ]
    options: dict[str, Any] = {**SCALARS, "blocksize": BLOCKSIZE, "steps": [5] * len(shapes)}
    if half:
        options["seed"] = torch.tensor(7, device=device.torch)
    return StepCase(**tensors, options=options)


def moves(step: StepCase) -> None:
    """Take a few steps, so that no state is zero; raises unless each goes against the gradient."""
    half = step.params[0].dtype is torch.bfloat16
    before = step.params[0].float().clone()
    for _ in range(3):
        step.step()
    # A bf16 parameter moves by chance, a whole unit in the last place or not at all.
    decay = 1.0 if half else (1 - SCALARS["lr"] * SCALARS["weight_decay"]) ** 3
    moved = step.params[0].float() - before * decay
    share = float((moved * step.grads[0].float() <= 0).float().mean())
    if not share > (0.9 if half else 0.99) or not bool((moved != 0).any()):
        raise AssertionError(f"the step goes against the gradient for {share:.3f} of the elements")


def fused(name: str, device: Device, shapes: list[tuple[int, int]]) -> Contender:
    """torch.optim.AdamW(fused=True) over fp32 parameters of these shapes."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device.torch)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    made = torch.optim.AdamW(
        params, lr=SCALARS["lr"], weight_decay=SCALARS["weight_decay"], fused=True,
        capturable=device.gpu,
    )  # fmt: skip
    made.step()
    return Contender(name, [made.step])
