"""What export refuses, in whose name, and that the model is as before after a failure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_exports import Each
from torch import nn

import feinwerk
from feinwerk.nn import LoRALinear, NF4Linear
from feinwerk.onnx import export

X = torch.zeros(2, 64)


def make_model() -> Each:
    return Each(layer=LoRALinear(NF4Linear(64, 8), 4, lora_alpha=8)).eval()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"ops": "int4"},
            ValueError,
            r"ops must be one of feinwerk, contrib, portable, got 'int4'",
        ),
        ({"adapters": "baked"}, ValueError, r'adapters must be None, "inputs", "constants"'),
    ],
)
def test_options(options: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export(make_model(), (X,), tmp_path / "m.onnx", **options)


def test_no_module(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export: model must be a torch\.nn\.Module, got dict"):
        export({}, (X,), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_training_mode(tmp_path: Path) -> None:
    model = make_model()
    model.layers.train()
    with pytest.raises(ValueError, match=r"model must be in eval mode, got layers in training"):
        export(model, (X,), tmp_path / "m.onnx")


def test_meta(tmp_path: Path) -> None:
    model = Each(layer=NF4Linear(64, 8, device="meta")).eval()
    with pytest.raises(ValueError, match=r"layers\.layer\.weight must hold values, got a tensor"):
        export(model, (X,), tmp_path / "m.onnx")


def test_shards(tmp_path: Path) -> None:
    class Shard(torch.Tensor):
        placements = ()

    model = Each(layer=nn.Linear(64, 8)).eval()
    shard = model.layers["layer"].weight.detach().as_subclass(Shard)
    model.layers["layer"].weight = nn.Parameter(shard, requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.layer\.weight must be a whole tensor"):
        export(model, (X,), tmp_path / "m.onnx")


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "onnxscript" else find(name, *a),
    )
    with pytest.raises(
        ImportError, match=r"needs onnxscript, which pip install 'feinwerk\[onnx\]'"
    ):
        export(make_model(), (X,), tmp_path / "m.onnx")


def test_inputs_that_do_not_fit_a_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export: layers\.layer must get K = 64 columns"):
        export(make_model(), (torch.zeros(2, 65),), tmp_path / "m.onnx")


class Calling(nn.Module):
    """A layer of ours, and a call that has no ONNX form."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = LoRALinear(NF4Linear(64, 8), 4, lora_alpha=8), kind
        self.A, self.B = (nn.Parameter(torch.zeros(*size)) for size in ((4, 64), (8, 4)))
        self.W = nn.Parameter(torch.ones(8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.kind == "raises":
            raise RuntimeError("the user's own")
        if self.kind == "weight_norm":
            return y + feinwerk.weight_norm(self.W, self.A, self.B, scaling=1.0)
        return y + feinwerk.dora_linear(x, self.W, self.A, self.B, torch.ones(8), scaling=1.0)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("raises", RuntimeError, "the user's own"),
        ("weight_norm", NotImplementedError, r"model must call only .*nf4_linear.*weight_norm"),
        (
            "dora",
            NotImplementedError,
            r"export: weight_norm must be given to dora_linear in a",
        ),
    ],
)
def test_a_failed_trace_leaves_the_model_as_it_was(
    kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = Calling(kind).eval()
    layer = model.layer
    with pytest.raises(error, match=message):
        export(model, (X,), tmp_path / "m.onnx")
    assert model.layer is layer
    assert not list(tmp_path.iterdir())
