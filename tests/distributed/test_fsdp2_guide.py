"""The script of docs/guides/fsdp2.md runs under torchrun and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "fsdp2.md"


def test_the_guides_script_runs_on_two_ranks(tmp_path: Path) -> None:
    script = "\n".join(re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    promised = re.findall(r"# -> (.*)$", script, re.M)
    assert len(promised) == 17
    (tmp_path / "train.py").write_text(script)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "train.py",
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == promised
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
