"""What is said, in one sentence, on a machine that lacks what the build needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sh", "env", "dirname", "uname")


@pytest.fixture
def path_with(tmp_path: Path):
    """Makes a PATH that holds only the named programs (and the shell's own few)."""

    def make(*names: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in (*TOOLS, *names):
            (folder / name).symlink_to(shutil.which(name) or sys.exit(f"no {name} here"))
        return str(folder)

    return make


def check(path: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ROOT / ".ci" / "prerequisites", python],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_complete_machine_is_silent() -> None:
    result = check(os.environ["PATH"])
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_no_compiler(path_with) -> None:
    result = check(path_with("make", "git"))
    assert result.returncode == 1
    assert result.stderr == (
        "feinwerk: this machine lacks a C++ compiler (g++); on Debian: apt install g++\n"
    )


def test_everything_missing_is_one_sentence(path_with) -> None:
    result = check(path_with(), python="python3.99")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    for word in ("python3.99", "venv", "headers", "g++", "make", "git", "python3-dev"):
        assert word in result.stderr


def build(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("--quiet", "build_ext", "--inplace"))],
        cwd=ROOT,
        env={"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_install_without_a_compiler_says_what_to_do(path_with) -> None:
    result = build(path_with())
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "feinwerk: no C++ compiler was found; install one (on Debian: apt install g++) or set "
        "FEINWERK_NO_NATIVE=1 to install the pure-Python library."
    )


def test_a_wrong_cxx_is_named(path_with) -> None:
    result = build(path_with(), CXX="no-such-compiler")
    assert "feinwerk: CXX=no-such-compiler is not a program" in result.stderr


def test_no_native_needs_no_compiler(path_with, tmp_path: Path) -> None:
    result = build(
        path_with(),
        *("--quiet", "build", "--build-base", str(tmp_path / "build")),
        FEINWERK_NO_NATIVE="1",
    )
    assert result.returncode == 0, result.stderr
    built = tmp_path / "build" / "lib"
    assert (built / "feinwerk" / "__init__.py").is_file()
    assert not list(built.rglob("*.so"))
