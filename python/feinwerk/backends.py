"""Says which backend serves each op on each device, and why: no fallback is silent."""

from __future__ import annotations

import importlib.metadata
import os

import torch

from feinwerk import _library, _native


def available() -> tuple[str, ...]:
    """Return the names of the backends that can run on this machine's CPU.

    Returns:
        ("reference", "cpp") with the native extension, else ("reference",).

    Example:
        >>> "reference" in available()
        True
    """
    return ("reference", "cpp") if _native.available() else ("reference",)


def isa() -> str | None:
    """Return the instruction set that the `cpp` backend runs, or None without it.

    Returns:
        One of scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx, neon; or None.

    Raises:
        ValueError: if FEINWERK_ISA names one that is unknown.
        NotImplementedError: if this CPU lacks the one that FEINWERK_ISA names.

    Example:
        >>> isa() is None or isinstance(isa(), str)
        True
    """
    return _native.isa() if _native.available() else None


def serving(op: str, device_type: str = "cpu") -> tuple[str, str]:
    """Return the backend that serves one op on one device, and the reason.

    Args:
        op: an op's stem, for example "nf4_linear".
        device_type: "cpu", "cuda" or another torch device type.

    Returns:
        (backend, reason).

    Raises:
        ValueError: if there is no such op.

    Example:
        >>> serving("nf4_linear", "mps")
        ('reference', 'no kernel for mps')
    """
    if op not in _library.OPS:
        raise ValueError(f"serving: op must be one of {', '.join(_library.OPS)}, got {op!r}")
    if device_type == "cuda":
        missing = _library.why_no_triton()
        if _library.forced_backend() == "reference":
            return "reference", "forced by feinwerk.testing"
        if missing is not None:
            return "reference", missing
        return "triton", f"Triton {importlib.metadata.version('triton')}"
    if device_type != "cpu":
        return "reference", f"no kernel for {device_type}"
    if _library.forced_backend() is not None:
        return str(_library.forced_backend()), "forced by feinwerk.testing"
    if _native.available():
        why = "forced by FEINWERK_ISA" if os.environ.get("FEINWERK_ISA") else "best of this CPU"
        return "cpp", f"native extension, ISA {_native.isa()} ({why})"
    return "reference", f"native extension not available: {_native.why_unavailable()}"


def describe() -> str:
    """Return a table of what serves each op here, and why.

    Returns:
        Text of several lines: the extension, its instruction sets and threads, then one line per
        op and device.

    Raises:
        ValueError: if FEINWERK_ISA names an instruction set that is unknown.
        NotImplementedError: if this CPU lacks the one that FEINWERK_ISA names.

    Example:
        >>> print(describe())  # doctest: +SKIP
    """
    lines = [f"feinwerk on torch {torch.__version__}"]
    if _native.available():
        lines += [
            f"native extension  available, ISA {_native.isa()} of {', '.join(_native.isas())}",
            f"threads           {_native.openmp()}",
        ]
    else:
        lines.append(f"native extension  not available: {_native.why_unavailable()}")
    lines += ["", f"{'op':<22}{'device':<8}{'backend':<11}why"]
    for op in _library.OPS:
        for device_type in ("cpu", "cuda"):
            backend, why = serving(op, device_type)
            lines.append(f"{op:<22}{device_type:<8}{backend:<11}{why}")
    return "\n".join(lines)
