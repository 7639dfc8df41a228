"""Installs a built wheel with the oldest supported torch in a clean environment and uses it.

    wheel_smoke.py dist/feinwerk-0.1.0-....whl [--torch 2.8.0]

The environment is temporary (6.5 GB for torch 2.8.0 on x86-64: its only build for this Python in
the registry is the CUDA one) and removed at the end; --environment keeps it for the next time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

OLDEST_TORCH = "2.8.0"

USE = """
import sys, warnings
warnings.simplefilter("error")
import torch, feinwerk
from feinwerk import _native, backends
assert "site-packages" in feinwerk.__file__, feinwerk.__file__
assert _native.available(), _native.why_unavailable()
torch.manual_seed(0)
for isa in _native.isas():
    _native.force_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = feinwerk.NF4Weight.from_dense(torch.randn(96, 200, dtype=dtype))
        dense = weight.dequantize(dtype)
        x = torch.randn(5, 200, dtype=dtype, requires_grad=True)
        y = weight.linear(x)
        y.sum().backward()
        torch.testing.assert_close(y, x.detach() @ dense.T, atol=0.5, rtol=0.05)
        torch.testing.assert_close(x.grad, torch.ones_like(y) @ dense, atol=0.5, rtol=0.05)
warnings.simplefilter("default")  # torch's compiler warns about itself
compiled = torch.compile(lambda x: weight.linear(x), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), y, atol=0.5, rtol=0.05)
import ctypes, feinwerk.onnx  # needs no onnxruntime to find the library, nor the library to load
assert ctypes.CDLL(feinwerk.onnx.library_path()).RegisterCustomOps
print(f"torch {torch.__version__}, feinwerk {feinwerk.__version__}, "
      f"instruction sets {' '.join(_native.isas())}, {_native.openmp()}")
backends.describe()
"""


def check_contents(wheel: Path) -> None:
    """The wheel holds the package, its extension, its custom-op library and no other library."""
    names = zipfile.ZipFile(wheel).namelist()
    libraries = sorted(name for name in names if ".so" in name)
    assert len(libraries) == 2, libraries
    assert libraries[0].startswith("feinwerk/_C"), libraries
    assert libraries[1] == "feinwerk/onnx/libfeinwerk_onnx.so", libraries
    for name in ("feinwerk/__init__.py", "feinwerk/py.typed", "feinwerk/_C.pyi"):
        assert name in names, f"{name} is not in the wheel"
    foreign = {name.split("/")[0] for name in names} - {"feinwerk"}
    assert all(name.endswith(".dist-info") for name in foreign), foreign


def run(*command: object) -> None:
    """Run a command away from the checkout; its failure is ours."""
    subprocess.run([str(part) for part in command], cwd=tempfile.gettempdir(), check=True)


def smoke(wheel: Path, torch: str, environment: Path) -> None:
    """Make the environment unless it is there, install the wheel, use it."""
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not python.exists():
        run(sys.executable, "-m", "venv", environment)
    start = time.monotonic()
    run(*pip, "install", f"torch=={torch}", "numpy")
    print(f"wheel smoke: torch {torch} installed in {time.monotonic() - start:.0f} s", flush=True)
    run(*pip, "install", "--force-reinstall", "--no-deps", wheel)
    run(*pip, "check")
    run(python, "-I", "-c", USE)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default=OLDEST_TORCH, help="version (default: %(default)s)")
    parser.add_argument("--environment", type=Path, help="a venv to make, use and keep")
    options = parser.parse_args()
    os.environ.pop("FEINWERK_ISA", None)
    os.environ.pop("PYTHONPATH", None)
    wheel = options.wheel.resolve()
    check_contents(wheel)
    if options.environment:
        smoke(wheel, options.torch, options.environment.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="feinwerk-smoke-") as folder:
            smoke(wheel, options.torch, Path(folder) / "venv")
    print("wheel smoke: passed")


if __name__ == "__main__":
    main()
