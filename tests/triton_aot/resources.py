"""What a compiled kernel takes: registers, spills, shared memory, and which instructions it has."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from triton import knobs

from tests.triton_aot.targets import Target

# A dot of these is a matrix instruction on every target; of fp32 only where TF32 was asked for.
_NARROW = re.compile(r"tt\.dot(?:_scaled)? [^\n]*: tensor<[\dx]+x(?:bf16|f16|i8|f8\w+)")
_TF32 = re.compile(r"tt\.dot [^\n]*inputPrecision = (?:tf32|bf16)")
_NVIDIA = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# What a kernel launched beside the one before it must do before it reads what that may write: all
# but ld.global.nc, which is for constants.
_WAIT = "griddepcontrol.wait"
_ACCESS = re.compile(r"ld\.global(?!\.nc)|st\.global|cp\.async|atom\.")


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. `spilled` in bytes on NVIDIA, in registers and scratch bytes on AMD."""

    registers: int
    spilled: int
    shared: int
    matrix: str  # its matrix instruction, "fma" for a product without, "" for no product
    copies: str  # "tma", "cp.async" or ""
    needs_matrix: bool
    early: bool  # it may read what the kernel before it has not yet written


def resources_of(compiled: Any, target: Target) -> Resources:
    """Read a compiled kernel's own text; no GPU is asked."""
    text = compiled.asm["ptx" if target.gpu.backend == "cuda" else "amdgcn"]
    registers, spilled, static = (_nvidia if target.gpu.backend == "cuda" else _amd)(compiled)
    middle = compiled.asm["ttir"]
    found = next((word for word in target.matrix if word in text), "")
    copies = "tma" if "cp.async.bulk.tensor" in text else "cp.async" if "cp.async" in text else ""
    return Resources(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared + static,
        matrix=found or ("fma" if "tt.dot" in middle else ""),
        copies=copies,
        needs_matrix=bool(_NARROW.search(middle) or _TF32.search(middle)),
        early=getattr(compiled.metadata, "launch_pdl", False) and _early(text),
    )


def _early(ptx: str) -> bool:
    wait, first = ptx.find(_WAIT), _ACCESS.search(ptx)
    return wait < 0 or (first is not None and first.start() < wait)


def _nvidia(compiled: Any) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = _NVIDIA.search(done.stdout + done.stderr)
    if found is None:
        raise ValueError(f"cuobjdump: no resources in {done.stdout + done.stderr!r}")
    registers, stack, static, local = map(int, found.groups())
    # From sm_90 on the system keeps 1024 bytes, which are counted here.
    kept = 1024 if compiled.metadata.target.arch >= 90 else 0
    return registers, stack + local, max(0, static - kept)


def _amd(compiled: Any) -> tuple[int, int, int]:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"amdgcn: no .{name}")
        return int(found[1])

    # A scalar register that spills goes into a vector register, not to memory.
    spilled = count("vgpr_spill_count") + count("private_segment_fixed_size")
    return count("vgpr_count"), spilled, 0
