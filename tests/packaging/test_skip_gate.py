"""The plugin that fails a run for a skip outside the allow-list."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("needs a GPU, none here")

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError
"""


def run(folder: Path, allowed: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_sample.py").write_text(TESTS)
    (folder / "allowed.txt").write_text(allowed)
    options = ["-p", "tests.skip_gate", "--skips-allowed", str(folder / "allowed.txt")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", folder, "-c", "/dev/null", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_allowed_skip_passes(tmp_path: Path) -> None:
    result = run(tmp_path, "# comment\n\ntest_sample.py::test_skips: needs a GPU\n")
    assert result.returncode == 0, result.stdout


def test_any_other_skip_fails_and_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "test_sample.py::test_skips: needs triton\n")
    assert result.returncode == 1
    assert "test_sample.py::test_skips: needs a GPU, none here" in result.stdout
    assert "1 passed, 1 skipped, 1 xfailed" in result.stdout


def test_a_malformed_list_is_an_error(tmp_path: Path) -> None:
    result = run(tmp_path, "no reason given\n")
    assert result.returncode == 4
    assert "a line must be `id: reason`" in result.stdout + result.stderr
