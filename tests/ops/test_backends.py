"""Backend choice is observable: what is available, what serves each op, and what is forced."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
import torch

from feinwerk import _library, _native, backends, testing


def test_every_op_is_served_and_described() -> None:
    text = backends.describe()
    for op in _library.OPS:
        assert op in text
        assert backends.serving(op)[0] in backends.available()
        assert backends.serving(op, "cuda")[0] == "triton"
    assert backends.serving("nf4_linear", "mps") == ("reference", "no kernel for mps")


def test_without_triton_cuda_has_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "why_no_triton", lambda: "Triton is not installed")
    for op in _library.OPS:
        assert backends.serving(op, "cuda") == ("reference", "Triton is not installed")


def test_all_ops_are_registered() -> None:
    assert set(_library.OPS) == {
        "adamw_step",
        "blockwise_dequantize",
        "blockwise_quantize",
        "lora_linear",
        "lora_linear_backward",
        "nf4_dequantize",
        "nf4_embedding",
        "nf4_linear",
        "nf4_linear_backward",
        "nf4_quantize",
        "square_sum",
        "weight_norm",
    }
    for record in _library.OPS.values():
        assert set(record.implementations) == {"reference", "cpp", "triton"}
        assert find_spec(record.triton), record.triton


def test_forcing_a_backend_is_seen_and_undone(backend: str) -> None:
    name, reason = backends.serving("nf4_linear")
    assert name == backend.partition("-")[0]
    assert reason == "forced by feinwerk.testing"
    if backend.startswith("cpp-"):
        assert backends.isa() == backend.removeprefix("cpp-")


def test_the_default_returns_after_forcing() -> None:
    before = backends.serving("nf4_linear"), backends.isa()
    for name in testing.backend_ids():
        with testing.use_backend(name):
            pass
    assert (backends.serving("nf4_linear"), backends.isa()) == before


def test_what_a_kernel_does_not_serve_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = types.ModuleType("feinwerk_test_kernel")
    kernel.foo = lambda x, y=0: x + y if x > 0 else NotImplemented  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    run = _library._lazy(kernel.__name__, "foo", lambda x, y=0: ("reference", x, y), True)
    assert run(1, y=2) == 3
    assert run(-1, y=2) == ("reference", -1, 2)


def test_triton_on_cpu_without_the_interpreter_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match=r"'triton'.*TRITON_INTERPRET=1.*it is not set"):
        _library.force_backend("triton")
    assert _library.forced_backend() is None


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="force_backend: name must be"):
        _library.force_backend("cuda")
    with pytest.raises(ValueError, match="serving: op must be one of"):
        backends.serving("nf4_lineer")


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEINWERK_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


CODE = (
    "import torch, feinwerk\n"
    "packed, absmax = feinwerk.nf4_quantize(torch.ones(4, 64))\n"
    "print(feinwerk.backends.isa())\n"
)


def test_feinwerk_isa_forces_one_for_the_process() -> None:
    isas = _native.isas() if _native.available() else []
    for isa in isas[:1]:  # `use_backend` forces each of them in this process
        done = run_with_isa(isa, CODE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [isa]


def test_an_unknown_feinwerk_isa_is_an_error() -> None:
    if not _native.available():
        return  # nothing reads it
    done = run_with_isa("avx1024", CODE)
    assert done.returncode != 0
    assert "avx1024" in done.stderr
    assert "FEINWERK_ISA" in done.stderr


def test_poison_reaches_what_feinwerk_allocates() -> None:
    code = "def allocate(torch):\n    return torch.empty(3), torch.empty(3, dtype=torch.uint8)\n"
    inside: dict[str, object] = {"__name__": "feinwerk.pretend"}
    exec(code, inside)
    floats, integers = inside["allocate"](torch)  # type: ignore[operator]
    assert floats.isnan().all()
    assert integers.tolist() == [255] * 3
