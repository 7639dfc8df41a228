"""Checks the optimizers on one real GPU bit by bit, then times their steps beside torch's fused.

    PYTHONPATH=python:. python3 -m benchmarks.gpu.optim_check OUT.json [--seconds 60]

The truth is the CPU's, which may be the slow reference: sizes are small. Groups of checks run in
processes of their own, side by side, as most of their time is compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import optim_speed
from benchmarks.gpu.optim_training import GPU, Checks, no_waiting, optimizers, sharded
from feinwerk import square_sum
from feinwerk.testing.adamw import MASTERS, StepCase, make_step

# Whole blocks, rows with a rest, odd rows, short rows, vectors, numbers, empty.
SHAPES = ((8, 512), (5, 300), (7, 33), (300, 16), (40, 8), (33,), (1025,), (3, 2, 100), (), (0, 4))
SEED = 11


def on_gpu(case: StepCase) -> StepCase:
    """The same case in memory of the GPU."""
    tensors = {name: [t.to(GPU) for t in found] for name, found in case.tensors.items()}
    return StepCase(**tensors, options=dict(case.options))


def on_cpu(case: StepCase) -> StepCase:
    """And back."""
    tensors = {name: [t.cpu() for t in found] for name, found in case.tensors.items()}
    return StepCase(**tensors, options=dict(case.options))


def same_steps(case: StepCase, special: bool = False, **options: Any) -> None:
    """Three steps on both, and every bit of every tensor."""
    there = on_gpu(case)
    for step in range(3):
        case.step(**options)
        there.step(**{name: moved(value) for name, value in options.items()})
        on_cpu(there).assert_same(case, f"step {step}")
        case.advance(step)
        if special:
            for grad in case.grads:
                odd = torch.tensor([0.0, 1e-45, 1e-30, -1e18, -1e20, 3e38, torch.inf, torch.nan])
                flat = grad.view(-1)[step::13]
                flat.copy_(odd.to(grad.dtype).repeat(len(flat) // 8 + 1)[: len(flat)])
        there.options["steps"] = list(case.options["steps"])
        for theirs, mine in zip(there.grads, case.grads, strict=True):
            theirs.copy_(mine)


def moved(value: Any) -> Any:
    """A tensor on the GPU; anything else as it is."""
    return value.to(GPU) if isinstance(value, torch.Tensor) else value


def coded(master: str) -> Checks:
    """8-bit states."""
    for blocksize in (256, 64, 100):
        for special in (False, True):

            def check(blocksize: int = blocksize, special: bool = special) -> None:
                grads = torch.float32 if master == "fp32" else torch.bfloat16
                case = make_step(
                    SHAPES, master=master, states=torch.uint8, grads=grads, blocksize=blocksize
                )
                same_steps(case, special)

            kind = "odd values" if special else "normal"
            yield f"8-bit, {master}, blocksize {blocksize}, {kind}", check

    def large() -> None:
        shapes = ((2, 9000), (1, 4096), (3, 2048))
        same_steps(make_step(shapes, master=master, states=torch.uint8, blocksize=8192))

    yield f"8-bit, {master}, large blocks", large


def plain() -> Checks:
    """fp32 and bf16 states, and what all share."""
    for master in MASTERS:
        for states in (torch.float32, torch.bfloat16):

            def check(master: str = master, states: torch.dtype = states) -> None:
                grads = torch.float32 if master == "fp32" else torch.bfloat16
                same_steps(make_step(SHAPES, master=master, states=states, grads=grads), True)

            yield f"{states}, {master}", check

    def fp16_gradients() -> None:
        same_steps(make_step(SHAPES, grads=torch.float16))

    def scalars() -> None:
        case = make_step(SHAPES, states=torch.uint8)
        case.options |= {"maximize": True, "beta1": 0.8, "eps": 1e-3}
        numbers = {
            "clip_coef": torch.tensor([0.37], dtype=torch.float64),
            "grad_scale": torch.tensor(60000.0, dtype=torch.float16),
            "found_inf": torch.zeros(1),
        }
        same_steps(case, **numbers)

    def left_out() -> None:
        for states in (torch.uint8, torch.float32):
            for found in (1.0, torch.nan):
                case = make_step(SHAPES, states=states)
                there = on_gpu(case)
                there.step(found_inf=torch.tensor([found], device=GPU))
                on_cpu(there).assert_same(case)

    def strides() -> None:
        for states in (torch.uint8, torch.float32):
            case = make_step(((5, 300),), states=states)
            there = on_gpu(case)
            there.grads[0] = there.grads[0].t().contiguous().t()
            case.step()
            there.step()
            on_cpu(there).assert_same(case)

    def words() -> None:
        for first in (0, 5, 2**33 + 64):
            case = make_step(((9, 512), (1000,)), master="stochastic", states=torch.uint8)
            same_steps(case, first_elements=[first, first])

    def numbers_on_the_gpu_are_not_waited_for() -> None:
        case = on_gpu(make_step(SHAPES, states=torch.uint8))
        numbers = {
            name: torch.ones((), device=GPU) for name in ("clip_coef", "grad_scale", "found_inf")
        }
        case.step(**numbers)
        with no_waiting():
            case.step(**numbers)
            square_sum(case.params)

    for check in (
        fp16_gradients,
        scalars,
        left_out,
        strides,
        words,
        numbers_on_the_gpu_are_not_waited_for,
    ):
        yield check.__name__.replace("_", " "), check


def sums() -> Checks:
    """square_sum: the integers themselves."""

    def value(limbs: torch.Tensor) -> tuple[int, list[int]]:
        found = limbs.tolist()
        return sum(digit << 30 * i for i, digit in enumerate(found[:-2])), found[-2:]

    def check(*tensors: torch.Tensor) -> None:
        want, got = value(square_sum(tensors)), value(square_sum([t.to(GPU) for t in tensors]))
        assert got == want, f"{got} instead of {want}"

    generator = torch.Generator().manual_seed(SEED)
    shapes = (
        (3, 5000),
        (40, 33),
        (64, 1024),
        (7, 16),
        (300, 3),
        (5, 1),
        (1000,),
        (2, 3, 4),
        (0, 4),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        spread = 1.0 if dtype is torch.float16 else 12.0
        tensors = [
            torch.randn(s, generator=generator)
            * (torch.randn(s, generator=generator) * spread).clamp(-80, 80).exp()
            for s in shapes
        ]
        yield f"square_sum {dtype}", lambda t=tensors, d=dtype: check(*(x.to(d) for x in t))
    odd = torch.randn(50, 70, generator=generator)
    odd[3, 5], odd[9, 9], odd[11, 0] = torch.inf, torch.nan, -torch.inf
    largest = torch.full((4, 2000), torch.finfo(torch.float32).max)
    smallest = torch.full((4, 20), 2.0**-149)
    yield "square_sum, infinities and NaN", lambda: check(odd, odd.view(-1))
    yield "square_sum, extremes", lambda: check(largest, smallest, largest.bfloat16())


GROUPS: dict[str, Callable[[], Checks]] = {
    **{f"coded {master}": lambda m=master: coded(m) for master in MASTERS},
    "plain": plain,
    "square_sum": sums,
    "optimizers": optimizers,
    "sharded": sharded,
}


def run_group(name: str, path: Path) -> None:
    """All checks of a group into a file, after each one."""
    found: dict[str, str] = {}
    for check, function in GROUPS[name]():
        try:
            function()
            found[check] = "PASS"
        except Exception as error:  # whatever it is: the others go on
            text = f"{type(error).__name__}: {error}".split("\n\n")[0]
            found[check] = f"FAIL {text[:500]}"
            traceback.print_exc()
        path.write_text(json.dumps(found))


def run_groups(seconds: float) -> dict[str, str]:
    """All groups side by side; what did not come in time has failed."""
    end, found = time.monotonic() + seconds, dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for i, name in enumerate(GROUPS):
            path = Path(folder) / f"{i}.json"
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu.optim_check",
                str(path),
                "--group",
                name,
            ]
            log = (Path(folder) / f"{i}.log").open("w")
            process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
            started[name] = path, process, log
        for name, (path, process, log) in started.items():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                found[f"{name}: in time"] = f"FAIL not done after {seconds:.0f} s"
            log.close()
            found |= json.loads(path.read_text()) if path.exists() else {}
            if process.returncode or not path.exists():
                tail = Path(log.name).read_text()[-600:]
                found.setdefault(f"{name}: ran", f"FAIL {tail}")
    return found


def main() -> None:
    """Check, time, write, and print the table last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--group")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.group:
        run_group(options.group, options.out)
        return
    begin = time.monotonic()
    found = run_groups(0.55 * options.seconds)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["checks"] = found
    options.out.write_text(json.dumps(result, indent=1))
    failed = [f"{name}: {verdict}" for name, verdict in found.items() if verdict != "PASS"]
    print("\n".join(failed))
    spent = time.monotonic() - begin
    timed = optim_speed.measure(options.seconds - spent - 2)
    result["speed"] = timed
    options.out.write_text(json.dumps(result, indent=1))
    passed = sum(verdict == "PASS" for verdict in found.values())
    print(f"{result['gpu']}, torch {result['torch']}: {passed} of {len(found)} checks passed")
    print("\n".join(optim_speed.table(timed)))
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
