"""A launch that was seen before runs the binary that Triton's own `run` would, and hooks are met.

Nothing is compiled: what Triton would compile is stood in for by a name for each of its keys.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from feinwerk import _library, triton_launch  # noqa: E402
from tests.triton_aot.targets import TARGETS, StandInDriver  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton_launch.KNOWN, reason="another Triton: every launch is its own run's"
)


def _small(out_ptr, x_ptr, n, stride, seen, scale, WIDTH: tl.constexpr, HOW: tl.constexpr):
    pass


class Stand:
    """A kernel whose compilations are numbered, and what was launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.kernel: Any = JITFunction(_small, do_not_specialize=["seen"])
        self.kernel._do_compile = self.compile

    def compile(self, key: str, signature: Any, device: Any, *rest: Any, **more: Any) -> Any:
        made: Any = CompiledKernel.__new__(CompiledKernel)
        made.src, made.name, made.metadata_group, made.hash = None, key, {}, key
        made.module, made._module_pid = object(), None
        made.function = made.packed_metadata = key
        made._run = lambda *args: self.launched.append(args)
        self.kernel.device_caches[device][0][key] = made
        return made

    def last(self) -> tuple[Any, ...]:
        """Grid, stream, function and metadata, and the arguments; the hooks between are left."""
        args = self.launched[-1]
        return (*args[:6], *args[9:])


class Driver(StandInDriver):
    """A GPU whose streams are numbered like the devices."""

    def get_current_device(self) -> Any:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return 7


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    monkeypatch.setattr(driver, "_active", Driver(TARGETS["sm_90"]))
    monkeypatch.setattr(triton_launch, "_KERNELS", {})
    return Stand()


def arguments() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Pointers of every alignment and dtype, none, integers at every edge, floats and bools."""
    memory = torch.zeros(64, dtype=torch.float32)
    pointers = [memory, memory[1:], memory[4:], memory.to(torch.bfloat16), memory.to(torch.int64)]
    numbers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), 2**31 + 16, 2**40, 2**63]
    others = [None, *numbers, True, False, 1.0, 0.5, float("inf")]
    options = [{}, {"num_warps": 4}, {"num_warps": 8}, {"num_warps": 4, "maxnreg": 255}]
    constants = itertools.product((16, 32, 1, True, None), ("table", "select", 1.0, torch.float32))
    found = []
    for i, (width, how) in enumerate(constants):
        for j in range(40):
            draw = random.Random(1000 * i + j)
            args = (
                draw.choice(pointers), draw.choice([*pointers, None]), draw.choice(numbers),
                draw.choice(others), draw.choice(others), draw.choice(others),
            )  # fmt: skip
            found.append((args, {"WIDTH": width, "HOW": how, **draw.choice(options)}))
    return found


def test_launches_are_those_of_triton(stand: Stand) -> None:
    other = Stand()
    cases = arguments()
    for turn in range(2):  # known from the second on
        for i, (args, options) in enumerate(cases):
            grid = ((3, 4, 5), (3, 4), (3,))[i % 3]
            options = {"enable_fp_fusion": False, **options}
            triton_launch.run(stand.kernel, grid, 0, args, options)
            other.kernel.run(*args, grid=grid, warmup=False, **options)
            mine, theirs = stand.last(), other.last()
            assert mine[:6] == theirs[:6], (turn, args, options)
            assert all(a is b for a, b in zip(mine[6:], theirs[6:], strict=True)), (args, options)
    assert len(stand.launched) == len(other.launched) == 2 * len(cases)
    binaries = {launched[4] for launched in stand.launched}
    assert len(binaries) == len(stand.kernel.device_caches[0][0]) > 400


def test_what_is_known_does_not_run_triton(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = (
        (torch.zeros(16), None, 5, 1, 2, 0.5),
        {"WIDTH": 16, "HOW": "table", "enable_fp_fusion": False},
    )
    triton_launch.run(stand.kernel, (1,), 0, args, options)
    monkeypatch.setattr(stand.kernel, "run", None)
    triton_launch.run(stand.kernel, (2,), 0, args, options)
    assert stand.last()[:4] == (2, 1, 1, 7)
    assert stand.launched[-1][6:9] == (None, None, None)
    with pytest.raises(TypeError):  # one of the pointers elsewhere
        triton_launch.run(stand.kernel, (1,), 0, (torch.zeros(16)[1:], *args[1:]), options)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_met(stand: Stand, hook: str) -> None:
    args, options = (
        (torch.zeros(16), None, 5, 1, 2, 0.5),
        {"WIDTH": 16, "HOW": "table", "enable_fp_fusion": False},
    )
    for _ in range(2):
        triton_launch.run(stand.kernel, (1,), 0, args, options)
    assert stand.launched[-1][7:9] == (None, None)
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        triton_launch.run(stand.kernel, (1,), 0, args, options)
    finally:
        chain.remove(print)
    assert chain in stand.launched[-1][7:9]
    stand.kernel.add_pre_run_hook(lambda *args, **options: stand.launched.clear())
    triton_launch.run(stand.kernel, (1,), 0, args, options)
    assert len(stand.launched) == 1


class Watching(TorchDispatchMode):
    """Lets everything pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_the_dispatcher_is_left_out_only_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.ones(4)
    negative = torch.ones(4, dtype=torch.complex64).conj().imag
    assert not _library._unseen((x,))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    unseen = _library._unseen
    assert not unseen((x,))  # a gradient may be recorded
    with torch.no_grad():
        assert unseen((x, None, 1, [x, torch.nn.Parameter(x)], True))
        assert unseen(([x, x],))
        assert not unseen((x, negative))
        assert not unseen((x, [negative]))
        assert not unseen((x, x.as_subclass(type("Own", (torch.Tensor,), {}))))
        with Watching():
            assert not unseen((x,))
        with torch.device("meta"):
            assert not unseen((x,))
        with torch.autograd.profiler.profile():
            assert not unseen((x,))
        torch.func.vmap(lambda y: (y, _never(unseen((y,))))[0])(torch.ones(2, 2))
        torch.jit.trace(lambda y: (y + 1, _never(unseen((y,))))[0], x, check_trace=False)


def _never(value: bool) -> None:
    assert not value
