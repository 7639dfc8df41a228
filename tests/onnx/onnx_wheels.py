"""Other packages' wheels for the tests, fetched by pip once into build/ and unpacked there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "wheels"
SECONDS = 300


def unpacked(*requirements: str) -> Path:
    """A folder with these wheels' contents, without what they depend on; skips where pip fails."""
    target = FOLDER / "-".join(requirements).replace("==", "-")
    if target.is_dir():
        return target
    staged = target.with_name(target.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--target", str(staged), *requirements]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(requirements)} cannot be downloaded: no answer in {SECONDS} s")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        shutil.rmtree(staged, ignore_errors=True)
        pytest.skip(f"{' '.join(requirements)} cannot be downloaded: {reason}")
    staged.rename(target)
    return target
