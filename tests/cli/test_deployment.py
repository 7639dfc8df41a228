"""The quickstart's step in ONNX Runtime, on a tiny model; left out, and where it cannot run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from quickstart_flags import arguments

from feinwerk.cli import deployment, main
from feinwerk.cli.deployment import Deployment, Side

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


def numbers_of(folder: Any) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return numbers


def test_onnx_runtime_answers_with_the_fine_tuned_model(tiny_model, questions, tmp_path):
    flags = arguments(tiny_model, questions, tmp_path, onnx=True, method="qdora", dtype="bfloat16")
    assert main(flags) == 0
    found = numbers_of(tmp_path)["deployment"]
    assert found["matches"]
    assert 0 < found["error"] < 1e-3
    names = ["torch dense", "torch NF4", "ORT dense", "ORT MatMulBnb4", "ORT Feinwerk"]
    assert [side["name"] for side in found["sides"]] == names
    assert all(len(side["seconds"]) == 16 for side in found["sides"])
    sizes = {side["name"]: side["bytes"] for side in found["sides"]}
    assert sizes["torch NF4"] < sizes["torch dense"] < sizes["ORT dense"]
    text = (tmp_path / "report.md").read_text()
    assert "## In ONNX Runtime" in text
    assert text.count("| with adapter, from ONNX Runtime |") == 2
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]

    from feinwerk.onnx import generate

    tokens = generate(tmp_path / "onnx" / "model.onnx", np.array([[5, 6, 7]]), max_new_tokens=2)
    assert tokens.shape[0] == 1

    # A resumed run takes the step again, or leaves it out; the trained adapter is the same.
    again = ["quickstart", "--resume", "--output", str(tmp_path), "--quiet"]
    assert main([*again, "--no-onnx"]) == 0
    assert numbers_of(tmp_path)["deployment"] is None


def test_a_dense_method_has_no_side_in_nf4(tiny_model, questions, tmp_path):
    flags = arguments(tiny_model, questions, tmp_path, onnx=True, method="lora", steps=1)
    assert main([*flags, "--no-generate"]) == 0
    found = numbers_of(tmp_path)["deployment"]
    assert found["matches"]
    names = ["torch dense", "torch with adapter", "ORT dense", "ORT Feinwerk"]
    assert [side["name"] for side in found["sides"]] == names


def test_without_the_packages_one_sentence_says_so(
    tiny_model, questions, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "onnxscript" else find(name, *a),
    )
    flags = arguments(tiny_model, questions, tmp_path, onnx=True, steps=1)
    flags.remove("--quiet")
    assert main([*flags, "--no-generate"]) == 0
    assert "no ONNX Runtime step: onnxscript is not installed" in capsys.readouterr().out
    assert not (tmp_path / "onnx").exists()
    assert numbers_of(tmp_path)["deployment"] is None


def test_without_the_library_one_sentence_says_so(monkeypatch):
    import feinwerk.onnx.library

    monkeypatch.setattr(feinwerk.onnx.library, "_NAME", "missing.so")
    assert "must be built" in str(deployment.why_not())


def test_logits_beyond_the_budget_fail_the_run():
    from test_quickstart import outcome

    sides = (Side("torch dense", 1, (0.5, 0.25, 0.5)), Side("ORT Feinwerk", 1, (0.1, 0.2, 0.1)))
    within = Deployment(sides, ("a",), 1e-5, 1e-5, 0.4)
    run = replace(outcome([4.0] * 30, [3.0] * 30), deployment=within)
    assert run.verdict[0]
    passed, sentence = replace(run, deployment=replace(within, share_of_budget=1.1)).verdict
    assert not passed
    assert "ONNX Runtime's logits do not match torch's" in sentence
    assert within.to_dict()["tokens_per_second"] == {"torch dense": 2.0, "ORT Feinwerk": 10.0}


def test_the_check_sees_another_adapter(tiny_model):
    """The comparison with fp64 is no formality: an adapter twice as strong fails it."""
    import copy

    import torch

    from feinwerk.cli import model
    from feinwerk.cli.settings import Settings

    settings = Settings(dtype="float32", rank=4)
    source = model.find_model(str(tiny_model))
    base, _ = model.load_model(source, cache=False)
    model.hold(base, settings, lambda *_: None)
    live = model.attach_adapters(base, settings, source).eval()
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    tokens, prompt = [5, 6, 7, 8, 9, 10], 4
    peer = deployment._torch_logits(deployment.dense_form(live, torch.float32), tokens)[
        prompt - 1 :
    ]
    own = deployment._torch_logits(live, tokens)[prompt - 1 :]
    assert deployment._compare(live, tokens, prompt, own, peer)[2] <= 1
    other = copy.deepcopy(live)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.01)
    wrong = deployment._torch_logits(other, tokens)[prompt - 1 :]
    assert deployment._compare(live, tokens, prompt, wrong, peer)[2] > 1
