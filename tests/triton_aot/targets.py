"""The GPUs that kernels are compiled for where there is none, and the driver that stands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from feinwerk.triton_lib import Gpu


@dataclass(frozen=True)
class Target:
    """A GPU as launchers see it and as the compiler does; `matrix`: its words for a product."""

    name: str
    gpu: Gpu
    compiler: GPUTarget
    matrix: tuple[str, ...]


def _cuda(arch: int, multiprocessors: int, shared_memory: int, *matrix: str) -> Target:
    gpu = Gpu("cuda", str(arch), multiprocessors, shared_memory)
    return Target(f"sm_{arch}", gpu, GPUTarget("cuda", arch, 32), (*matrix, "mma.sync"))


# A100, H100, B200 and MI300X. The compiler does not know the shared memory of a device (the
# vendors' manuals do), and a launch with more fails only where it runs.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 108, 166912),
        _cuda(90, 132, 232448, "wgmma"),
        _cuda(100, 148, 232448, "tcgen05.mma", "wgmma"),
        Target(
            "gfx942",
            Gpu("hip", "gfx942", 304, 65536),
            GPUTarget("hip", "gfx942", 64),
            ("v_mfma",),
        ),
    )
}


class StandInDriver:
    """What Triton asks a driver while it compiles; nothing is ever launched."""

    launcher_cls = None

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.compiler

    def get_current_device(self) -> str:
        # A kernel keeps what it compiled by device: every target is one of its own.
        return self.target.name

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def stand_in(target: Target) -> None:
    """Let Triton compile for a target from here on."""
    driver.set_active(StandInDriver(target))
