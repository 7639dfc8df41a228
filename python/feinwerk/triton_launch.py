"""Launches of kernels that were compiled before, without most of what Triton's `run` does.

```
   launch ──> binder ──> key ── known ──> the compiled kernel's launcher
              Triton's own  └─ new ────> kernel.run: compiles, launches, and is remembered
```
`JITFunction.run` reads settings, compares the globals that a kernel uses, writes options out as
text and builds metadata for hooks: 8 to 25 us a launch, which small steps wait for. What decides
which binary a launch takes, Triton's binder, is the same here, so that the choice is the same.
Whatever is unusual (hooks, debugging, AMD, another version of Triton) goes through `run`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# What `run` does with a compiled kernel was read in these.
KNOWN = triton.__version__.startswith(("3.6.", "3.9.")) and torch.version.hip is None


class _Kernel:
    """What is kept of one kernel on one device."""

    def __init__(self, kernel: Any, device: int) -> None:
        self.kernel = kernel  # held, as its id is the key
        self.bind = kernel.device_caches[device][-1]
        self.stream = driver.active.get_current_stream
        # By specialization and options: launcher, function, metadata.
        self.compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


_KERNELS: dict[tuple[int, int], _Kernel] = {}


def run(kernel: Any, grid: tuple[int, ...], device: int, args: Any, options: dict[str, Any]) -> Any:
    """`kernel[grid](*args, **options)` on the current device, `device`."""
    if not KNOWN or unusual(kernel):
        return kernel.run(*args, grid=grid, warmup=False, **options)
    known = _KERNELS.get((id(kernel), device))
    if known is None:
        known = _KERNELS[id(kernel), device] = _Kernel(kernel, device)
    bound, specialization, rest = known.bind(*args, **options)
    key = (*specialization, *rest.items())
    found = known.compiled.get(key)
    if found is None:
        made = kernel.run(*args, grid=grid, warmup=False, **options)
        if type(made) is CompiledKernel:
            known.compiled[key] = made.run, made.function, made.packed_metadata
        return made
    launcher, function, metadata = found
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    # Metadata and the hooks before and after: none.
    launcher(x, y, z, known.stream(device), function, metadata, None, None, None, *bound.values())
    return None


def unusual(kernel: Any) -> bool:
    """Whether something is set that only Triton's own `run` attends to."""
    runtime = knobs.runtime
    return bool(
        runtime.debug
        or kernel.debug
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook is not None
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )
