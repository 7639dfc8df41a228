"""Runs the launchers on META tensors and notes every kernel that they would start.

A launcher chooses its kernels by shapes, dtypes and the GPU, all of which META tensors and
`triton_lib.pretend` give it. Where it would launch, the kernel and its arguments are noted, once
for everything that Triton's own specialization makes one compilation of.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import feinwerk
from feinwerk import _library, triton_lib
from tests.triton_aot.inputs import Input
from tests.triton_aot.meta_tensors import REFERENCE
from tests.triton_aot.targets import TARGETS, Target, stand_in

# Before anything replaces it.
_RUN = JITFunction.run
_COMMON = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A compilation that a launcher asks for, and the first input that made it."""

    target: Target
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: Any
    first_input: str
    # What the record says of it.
    name: str
    types: str
    constants: str

    def compile(self) -> Any:
        """Compile as the launch would have."""
        stand_in(self.target)
        return _RUN(self.kernel, *self.arguments, grid=self.grid, warmup=True, **self.options)


class Collector:
    """Takes the place of JITFunction.run and notes launches."""

    def __init__(self) -> None:
        self.launches: dict[tuple[str, ...], Launch] = {}
        self.failures: list[str] = []
        self.now = ""

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        target = TARGETS[driver.active.get_current_device()]
        binder = kernel.device_caches[target.name][-1]
        bound, specialization, rest = binder(*args, **options)
        name = f"{kernel.__module__.split('.')[-2]}.{kernel.__name__}"
        types, constants = [], []
        for parameter, (kind, note) in zip(bound, specialization, strict=True):
            if kind == "constexpr":
                constants.append(f"{parameter.removesuffix('_ptr')}={_shown(bound[parameter])}")
            else:
                types.append(f"{kind}{'/16' if note and 'D' in note else ''}")
        constants += [f"{key}={rest[key]}" for key in sorted(rest) if key not in _COMMON]
        constants += [f"{key[4:]}={rest.get(key, '-')}" for key in _COMMON[:2]]
        key = (target.name, name, " ".join(types), " ".join(constants))
        if options.get("enable_fp_fusion", True):
            self.failures.append(
                f"{self.now}: {name} is launched with fp fusion: triton_lib.launch"
            )
        if key not in self.launches:
            self.launches[key] = Launch(target, kernel, args, options, grid, self.now, *key[1:])


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value)).removeprefix("torch.").replace(" ", "")


@contextmanager
def collecting() -> Iterator[Collector]:
    """Note launches instead of launching, inside the block."""
    collector = Collector()

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        collector.run(kernel, *args, **options)

    JITFunction.run = run
    try:
        yield collector
    finally:
        JITFunction.run = _RUN
        triton_lib.pretend(None)


def launches_of(wanted: Iterable[tuple[Target, Input]]) -> tuple[list[Launch], list[str]]:
    """Return what the launchers start for the inputs on the targets, and what failed."""
    with collecting() as collector:
        for target, each in wanted:
            stand_in(target)
            triton_lib.pretend(target.gpu)
            collector.now = f"{target.name}, {each.op}, {each.name}"
            try:
                _call(each)
            except Exception as error:
                collector.failures.append(f"{collector.now}: {type(error).__name__}: {error}")
    launches = sorted(collector.launches.items(), key=lambda item: item[0])
    return [launch for _, launch in launches], collector.failures


def _call(each: Input) -> None:
    """Run an op's launcher; its outputs must be like those of the op's shapes function."""
    record = _library.OPS[each.op]
    function = getattr(importlib.import_module(record.triton), each.op)
    result = function(*each.args, **each.kwargs)
    if (result is NotImplemented) != each.name.startswith(REFERENCE):
        raise ValueError(
            "the launcher does not serve it"
            if result is NotImplemented
            else f"the launcher serves it: the name must not open with {REFERENCE!r}"
        )
    if result is NotImplemented:
        return
    expected = getattr(torch.ops.feinwerk, each.op).default(*each.args, **each.kwargs)
    if _outline(result) != _outline(expected):
        raise ValueError(f"outputs are {_outline(result)}, must be {_outline(expected)}")


def _outline(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return f"{tuple(result.shape)} {result.dtype}"
    return [_outline(each) for each in result] if isinstance(result, list | tuple) else result


def kernels() -> dict[str, Any]:
    """Return every kernel of the package: the jit functions called *_kernel, by op and name."""
    found = {}
    ops = Path(feinwerk.__file__).parent / "ops"
    for path in sorted(ops.glob("*/triton*.py")):
        module = importlib.import_module(f"feinwerk.ops.{path.parent.name}.{path.stem}")
        for name, value in vars(module).items():
            own = isinstance(value, JITFunction) and value.__module__ == module.__name__
            if own and name.endswith("_kernel"):
                found[f"{path.parent.name}.{name}"] = value
    return found
