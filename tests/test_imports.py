"""`import feinwerk` is light and needs torch and numpy only; the public names are there."""

from __future__ import annotations

import subprocess
import sys

import feinwerk
import feinwerk.ops

OPTIONAL = (
    "triton",
    "onnx",
    "onnxruntime",
    "transformers",
    "peft",
    "safetensors",
    "bitsandbytes",
    "typer",
    "rich",
    "matplotlib",
    "hypothesis",
    "pytest",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_optional_packages() -> None:
    run(
        "import sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        "import torch, feinwerk\n"
        "from feinwerk import NF4Weight, quantize_model, nn\n"
        "packed, absmax = feinwerk.nf4_quantize(torch.ones(4, 64))\n"
        "assert feinwerk.nf4_dequantize(packed, absmax, shape=(4, 64)).sum() == 256\n"
    )


def test_imports_no_optional_package() -> None:
    added = run(
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import feinwerk\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    ).split()
    assert not set(added) & set(OPTIONAL)


def test_import_is_quick_beyond_torch() -> None:
    # On a busy machine everything takes longer: torch's own import is the measure then.
    torch_seconds, seconds = map(
        float,
        run(
            "import time\n"
            "start = time.perf_counter()\n"
            "import torch\n"
            "middle = time.perf_counter()\n"
            "import feinwerk\n"
            "print(middle - start, time.perf_counter() - middle)\n"
        ).split(),
    )
    assert seconds < max(0.5, torch_seconds / 4)


def test_works_without_the_extension_and_says_so_once() -> None:
    out = run(
        "import sys, warnings\n"
        "sys.modules['feinwerk._C'] = None\n"
        "import torch, feinwerk\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    packed, absmax = feinwerk.nf4_quantize(torch.ones(4, 64))\n"
        "    feinwerk.nf4_linear(torch.ones(2, 64), packed, absmax, N=4, K=64)\n"
        "print(*[str(w.message) for w in seen if 'feinwerk' in str(w.message)], sep='\\n')\n"
        "print(feinwerk.backends.describe())\n"
        "assert feinwerk.backends.available() == ('reference',)\n"
        "assert feinwerk.backends.isa() is None\n"
    )
    assert out.count("native extension is not available") == 1
    assert "native extension not available" in out


def test_public_names_exist() -> None:
    for name in feinwerk.__all__:
        assert getattr(feinwerk, name) is not None, name
    for name in feinwerk.ops.__all__:
        assert callable(getattr(feinwerk, name)), name
