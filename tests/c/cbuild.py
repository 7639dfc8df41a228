"""Builds the C tests with CMake into build/c-<name>, again only where a source has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """A build tool: beside this Python (its pip package), else on PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if not found:
        raise FileNotFoundError(f"{name} was not found; pip install {name}")
    return found


def build(name: str, *options: str) -> Path:
    """Configure and build test_abi and fuzz; returns the folder they are in."""
    folder = ROOT / "build" / f"c-{name}"
    configure = [
        *(program("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
        *("-DFEINWERK_PYTHON=OFF", "-DFEINWERK_TESTS=ON", "-DFEINWERK_WERROR=ON", *options),
    ]
    for command in (configure, [program("cmake"), "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return folder


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with some environment variables set and FEINWERK_ISA unset otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "FEINWERK_ISA"}
    return subprocess.run(
        [str(part) for part in command],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
