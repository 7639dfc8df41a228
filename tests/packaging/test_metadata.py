"""What the package declares: one version, few requirements, no torch in the build environment."""

import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata, version
from pathlib import Path

import feinwerk

ROOT = Path(__file__).resolve().parents[2]


def requirement_names(lines: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower() for line in lines}


def test_one_version_everywhere() -> None:
    assert version("feinwerk") == feinwerk.__version__
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "python/feinwerk/__init__.py" in cmake
    assert not re.search(r"project\([^)]*VERSION \"?\d", cmake)


def test_the_package_needs_torch_and_numpy_only() -> None:
    needed = [line for line in metadata("feinwerk").get_all("Requires-Dist") if "extra" not in line]
    assert requirement_names(needed) == {"torch", "numpy"}
    assert metadata("feinwerk")["Requires-Python"] == ">=3.10"


def test_a_build_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.M)[1]
    assert requirement_names(re.findall(r'"([^"]+)"', requires)) == {
        *("setuptools", "cmake", "ninja", "pybind11")
    }


def test_the_console_script() -> None:
    scripts = entry_points(group="console_scripts", name="feinwerk")
    assert [script.value for script in scripts] == ["feinwerk.cli:main"]


def test_the_development_extras_expand() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / ".ci" / "requirements.py", "dev"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = requirement_names(result.stdout.split())
    assert {"pytest", "ruff", "mypy", "transformers", "bitsandbytes"} <= names
    assert "feinwerk" not in names
    assert "torch" not in names  # installed first and alone
