"""`feinwerk plan`: what it prints is the plan, as tables and as JSON; bad options in one line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import feinwerk
from feinwerk.cli import main
from feinwerk.plan.sizes import show

ISSUE = [
    "plan", "--model", "llama-3.2-1b", "--method", "qdora", "--r", "16", "--world-size", "2",
    "--state-bits", "8", "--seq", "2048", "--batch", "4",
]  # fmt: skip
SETTINGS = {"method": "qdora", "r": 16, "world_size": 2, "state_bits": 8, "seq": 2048, "batch": 4}


def test_tables_show_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ISSUE, "--memory", "24GB"]) == 0
    printed = capsys.readouterr().out
    found = feinwerk.plan("llama-3.2-1b", **SETTINGS, memory="24GB")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for part in found.parts:
        row = f"{part.name} {show(part.bytes)} {show(part.at_peak)} {part.note}".strip()
        assert row in lines, row
    assert f"peak {show(found.peak)} in the {found.moment}" in lines
    assert (
        f"The largest batch that fits is {found.fit.batch}, with sequences of 2048 tokens." in lines
    )
    assert sum(line.endswith("fits") for line in lines) == sum(o.fits for o in found.fit.options)


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpointing", "--targets", "q_proj, v_proj", "--device", "cuda", "--json"]
    assert main([*ISSUE, *options, "--no-double-quant", "--stage", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = feinwerk.plan(
        "llama-3.2-1b", **SETTINGS, checkpointing=True, targets=("q_proj", "v_proj"),
        device="cuda", double_quant=False, stage=3,
    )  # fmt: skip
    assert printed == json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nope"], "plan: --model must be the path of a config.json or one of smol"),
        (["--state-bits", "4"], "plan: --state-bits must be one of 8, 16, 32, got 4"),
        (["--world-size", "0"], "plan: --world-size must be at least 1, got 0"),
        (["--targets", "head"], "plan: --targets must be all-linear or some of q_proj"),
        (["--memory", "big"], "plan: --memory must be bytes, or a number with a unit"),
        (["--reserve", "1GB"], "plan: --reserve must be left out without memory"),
        (["--stage", "2"], "plan: --stage must be 0 for one rank, got 2"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "smollm2-135m", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"feinwerk: {message}")
    assert len(captured.err.splitlines()) == 1


def test_a_model_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "--model" in capsys.readouterr().err
