"""The script of docs/guides/deepspeed.md runs under torchrun and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integrations.torchrun import torchrun

pytest.importorskip("deepspeed")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "deepspeed.md"


def test_the_guides_script_runs_on_two_ranks(tmp_path: Path) -> None:
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    source = "\n".join(blocks)
    script = tmp_path / "train.py"
    script.write_text(source)
    promised = re.findall(r"# -> (.*)$", source, re.M)
    assert len(promised) == 7
    output = torchrun(2, script.name, folder=tmp_path)
    # DeepSpeed prints as well.
    assert [line for line in output.splitlines() if line in promised] == promised, output
