"""What the run ran on: processor, memory, versions, and the process's peak memory by phase."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

import feinwerk

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "gguf", "numpy", "onnx", "onnxruntime",
    "onnxscript",
)  # fmt: skip


def describe_machine() -> dict[str, str]:
    """Return facts about the machine, in the order they are reported."""
    facts = {
        "processor": _processor(),
        "cores used": str(torch.get_num_threads()),
        "cores available": str(available_cores()),
        "memory": f"{_total_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "feinwerk kernels": feinwerk.backends.isa() or "none: the reference backend (slow)",
    }
    with suppress(OSError):
        facts["load average at the end"] = " ".join(f"{load:.1f}" for load in os.getloadavg())
    return facts


def versions() -> dict[str, str]:
    """Return the versions that decide the numbers."""
    found = {"feinwerk": feinwerk.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Start a new measurement of the peak; without Linux's clear_refs the peak only grows."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def return_free_memory() -> None:
    """Give what the allocator holds unused back to the system, where it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Return the peak resident memory in bytes since the last reset."""
    return _status_bytes("VmHWM") or _rusage_bytes()


def resident_memory() -> int:
    """Return the resident memory in bytes."""
    return _status_bytes("VmRSS") or _rusage_bytes()


def _status_bytes(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
