"""The device under test: events, graphs, memory, facts; in dry runs a CPU stands in for all.

A dry run goes through every line with tiny sizes, so that no code is first run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from feinwerk import _library, testing

ROOT = Path(__file__).resolve().parent.parent.parent
# What nvidia-smi is asked for; it is only ever read.
FACTS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
PACKAGES = ("torch", "triton", "numpy", "bitsandbytes", "peft", "transformers")
CYCLES_A_SECOND = 1.7e9  # of torch.cuda._sleep, about; only the host's head start depends on it
DRY_CACHE = 1 << 12


class Event(Protocol):
    """A moment on the device."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class HostEvent:
    """A moment on the host, for dry runs."""

    def __init__(self) -> None:
        self.moment = 0.0

    def record(self) -> None:
        """Note the time."""
        self.moment = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from here to `end`, never zero."""
        return max(1e3 * (end.moment - self.moment), 1e-6)


class Device:
    """One GPU, or the CPU in its place.

    Args:
        kind: "cuda" or "cpu".
        dry: tiny sizes, a few rounds.
    """

    def __init__(self, kind: str = "cuda", dry: bool = False) -> None:
        if kind not in ("cuda", "cpu"):
            raise ValueError(f'Device: kind must be "cuda" or "cpu", got {kind!r}')
        self.torch = torch.device(kind)
        self.gpu = kind == "cuda"
        self.dry = dry
        if _library.interpreting():
            mend()

    @property
    def cache_bytes(self) -> int:
        """The last-level cache, that copies have to exceed."""
        if not self.gpu:
            return DRY_CACHE
        return int(torch.cuda.get_device_properties(self.torch).L2_cache_size)

    def backend(self) -> contextlib.AbstractContextManager[object]:
        """What serves our ops: on a GPU their own choice, in the interpreter our kernels."""
        if self.gpu or not _library.interpreting():
            return contextlib.nullcontext()
        return testing.use_backend("triton-interpret")

    def synchronize(self) -> None:
        """Wait until everything has run; errors of kernels show here."""
        if self.gpu:
            torch.cuda.synchronize()

    def event(self) -> Event:
        """A new event."""
        return torch.cuda.Event(enable_timing=True) if self.gpu else HostEvent()

    def head_start(self, seconds: float) -> None:
        """Keep the device busy for about this long, while the host queues what is timed."""
        if self.gpu:
            torch.cuda._sleep(int(seconds * CYCLES_A_SECOND))  # type: ignore[no-untyped-call]

    def captured(self, work: Callable[[], object]) -> Callable[[], None]:
        """A graph that replays `work`; raises what went wrong first, and later captures may work.

        Nothing of an earlier run of `work` may be alive that holds its autograd graph: a leaf's
        node would wait on the stream of that run, which a capture does not allow.
        """
        if not self.gpu:
            return lambda: _discard(work())
        before = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                work()
        except Exception as error:
            _abandon(pool, before)
            first: BaseException = error
            while first.__context__ is not None:  # the capture's end complains in its turn
                first = first.__context__
            raise first from None
        return graph.replay

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """The most memory that a call holds beside what is there before and its result."""
        if not self.gpu:
            _discard(call())
            return 0
        _discard(call())  # libraries allocate their own workspaces at the first call
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(t.untyped_storage().nbytes() for t in _tensors(result))

    def release(self) -> None:
        """Hand cached memory back, so that a part starts with all of it."""
        if self.gpu:
            torch.cuda.empty_cache()


def _abandon(pool: Any, stream: torch.cuda.Stream) -> None:
    """Undo what torch.cuda.graph leaves behind where the end of a capture raises.

    It then stays on the capture's stream, the allocator goes on allocating for the graph, and the
    default generator believes itself captured; every later capture fails, and every step is slow.
    """
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it was ended already
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    with contextlib.suppress(RuntimeError):
        generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.synchronize()


def _discard(result: object) -> None:
    """Drop a result."""
    del result


def _tensors(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def mend() -> None:
    """Make bf16 right in Triton's interpreter."""
    from tests.triton_interpreter import mend_bf16

    mend_bf16()


def smi() -> dict[str, str]:
    """What nvidia-smi says, by name; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FACTS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = found.stdout.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(FACTS, values, strict=False)}


def versions() -> dict[str, str]:
    """Versions of what takes part; a peer that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if "torch" in found:
        found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The short commit of the checkout, "+dirty" where files of ours differ from it, or "".

    FEINWERK_COMMIT says it where the sources are a copy without their history.
    """
    if os.environ.get("FEINWERK_COMMIT"):
        return os.environ["FEINWERK_COMMIT"]
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "python", "benchmarks"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def describe(device: Device, ask: bool = True) -> dict[str, Any]:
    """Facts about the device for the results file; `name` is the file's.

    Args:
        device: which.
        ask: nvidia-smi too, which may take a second.
    """
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    if device.gpu:
        found = torch.cuda.get_device_properties(device.torch)
        facts |= {
            "gpu": found.name,
            "arch": f"sm_{found.major}{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": device.cache_bytes,
        }
    else:
        facts |= {"gpu": "a CPU, standing in", "arch": "none"}
    facts["nvidia_smi"] = smi() if ask else {}
    facts["name"] = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
    return facts
