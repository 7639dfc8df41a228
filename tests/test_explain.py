"""explain: a row for every layer, without PEFT installed as well."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from feinwerk import backends, explain, quantize_model
from feinwerk.nn import DoRALinear, LoRALinear


def model() -> nn.Module:
    net = nn.Sequential(
        nn.Embedding(10, 64), nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)),
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), nn.Linear(64, 10),
    )  # fmt: skip
    quantize_model(net, skip=("3",))
    return net


def test_plain_modules() -> None:
    rows = explain(model()).rows
    assert [(r.name, r.layer, r.path, r.op) for r in rows] == [
        ("0", "Embedding", "dense", ""),
        ("1.0", "NF4Linear", "fused", "nf4_linear"),
        ("2.0", "NF4Linear", "fused", "nf4_linear"),
        ("3", "Linear", "dense", ""),
    ]
    serving = backends.serving("nf4_linear")[0]
    assert [r.backend for r in rows] == ["", serving, serving, ""]
    assert explain(model().to("meta")).rows[1].backend == "reference"
    assert rows[0].why == "torch.nn.Embedding"


def test_the_table_puts_like_layers_on_one_line() -> None:
    text = str(explain(model()))
    lines = text.splitlines()
    assert lines[0] == "4 layers: 2 fused, 2 dense"
    assert lines[1].split() == ["path", "op", "backend", "count", "layer", "name", "why"]
    assert len(lines) == 5
    fused = next(line for line in lines if line.startswith("fused")).split()
    assert fused[3:6] == ["2", "NF4Linear", "*.*"]


def test_adapter_modules() -> None:
    net = model()
    net[3] = DoRALinear(net[3], 2, lora_alpha=4)
    net[1][0] = LoRALinear(net[1][0], 2, lora_alpha=4)
    rows = {r.name: r for r in explain(net).rows}
    assert (rows["1.0"].path, rows["1.0"].op) == ("fused", "lora_linear")
    assert (rows["3"].path, rows["3"].op) == ("fused", "dora_linear")
    assert rows["3"].backend == backends.serving("lora_linear")[0]
    net[1][0].merge()
    assert explain(net).rows[1].op == "nf4_linear"
    assert explain(net).rows[1].why.startswith("merged")


def test_a_model_that_is_one_layer_and_one_without_layers() -> None:
    assert [r.name for r in explain(nn.Linear(2, 2)).rows] == [""]
    assert str(explain(nn.ReLU())).startswith("0 layers: none")
    with pytest.raises(TypeError, match=r"explain: model must be a torch.nn.Module, got Tensor"):
        explain(torch.ones(2))  # type: ignore[arg-type]


def test_peft_is_not_needed() -> None:
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, feinwerk\n"
        "print(feinwerk.explain(torch.nn.Sequential(feinwerk.nn.NF4Linear(64, 8))).rows[0].path)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "fused\n", run.stderr
