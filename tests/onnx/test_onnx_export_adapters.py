"""Adapters in exported files: inputs with defaults, their names, other ranks, room, constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_exports import (
    FORMS,
    WITH,
    WITHOUT,
    Each,
    initializers,
    layer_of,
    nf4_linear,
    run,
    session,
)
from torch import nn

from feinwerk.nn import DoRALinear, LoRALinear, NF4Linear, disable_adapters
from feinwerk.onnx import AdapterRoom, export
from feinwerk.testing import (
    assert_same_bits,
    assert_within,
    assert_within_budget,
    linear_budget,
    make_x,
)
from feinwerk.testing.adapters import AdapterCase, make_adapters

N, K = 33, 96


def values(case: AdapterCase, path: str, dora: bool) -> dict[str, torch.Tensor]:
    """A case's adapter as the graph's inputs."""
    adapter, layer = case.adapters[0], layer_of(case)
    found = {
        f"{path}.lora_A": adapter.A,
        f"{path}.lora_B": adapter.B,
        f"{path}.scaling": torch.tensor([adapter.s]),
    }
    if dora:
        gain = layer._gain()
        found[f"{path}.gain"] = torch.zeros(0) if gain is None else gain.detach()
    return found


@pytest.mark.parametrize("ops", FORMS)
def test_one_file_serves_every_adapter(ops: str, tmp_path: Path) -> None:
    """A file exported with room for DoRA over NF4 and dense layers that have no adapter."""
    bases = {"nf4": "nested", "dense": "fp32"}
    options: dict[str, Any] = {"seed": 5}  # one base for all of them
    first = {n: make_adapters(N, K, 4, (4,), base=b, **options) for n, b in bases.items()}
    model = Each(**{name: layer_of(case).base_layer for name, case in first.items()}).eval()
    xs = tuple(case.x for case in first.values())
    path = tmp_path / "m.onnx"
    report = export(model, xs, path, ops=ops, adapters=AdapterRoom(["layers"], dora=True))
    parts = ("lora_A", "lora_B", "scaling", "gain")
    assert report.adapter_inputs == tuple(f"layers.{n}.{p}" for n in bases for p in parts)
    assert {layer.adapter for layer in report.layers} == {"room for DoRA"}
    overridable = session(path, ops == "feinwerk").get_overridable_initializers()
    shapes = {value.name: value.shape for value in overridable}
    assert list(shapes) == list(report.adapter_inputs)
    assert shapes["layers.nf4.lora_A"] == ["layers.nf4.r", K]
    assert shapes["layers.nf4.lora_B"] == [N, "layers.nf4.r"]
    assert shapes["layers.nf4.scaling"] == [1]
    assert shapes["layers.nf4.gain"] == ["layers.nf4.gain_size"]
    for by in FORMS[ops]:
        got = run(path, by, xs)
        for case, y in zip(first.values(), got, strict=True):
            assert_within_budget(y, case.x, case.dense(torch.float32), case.bias)
        for r, dora in ((4, False), (7, False), (3, True)):
            cases = {
                n: make_adapters(N, K, 4, (r,), base=b, dora=(dora,), **options)
                for n, b in bases.items()
            }
            replaced: dict[str, torch.Tensor] = {}
            for name, case in cases.items():
                replaced |= values(case, f"layers.{name}", dora=True)
            got = run(path, by, tuple(case.x for case in cases.values()), **replaced)
            for case, y in zip(cases.values(), got, strict=True):
                assert_within(y, *case.bounds()["y"], torch.float32, f"{by}, r={r}")


def test_defaults_are_the_model_s_adapters(tmp_path: Path) -> None:
    """The values in the file are the layer's, the gain one division's, and each its own."""
    case = make_adapters(N, K, 2, (4,), base="nf4", dora=(True,))
    dora = layer_of(case)
    assert isinstance(dora, DoRALinear)
    half = LoRALinear(NF4Linear(K, N), 4, lora_alpha=8, dtype=torch.float16).eval()
    # Equal small tensors in two layers, which exporters like to make one.
    twin = LoRALinear(NF4Linear(K, N), 4, lora_alpha=8, dtype=torch.float16).eval()
    with torch.no_grad():
        twin.lora_A.copy_(half.lora_A)
    model = Each(dora=dora, fp16=half, twin=twin).eval()
    x = make_x((2, K), torch.float32)
    report = export(model, (x, x, x), tmp_path / "m.onnx")
    assert "layers.fp16.gain" not in report.adapter_inputs
    assert len(report.adapter_inputs) == 4 + 3 + 3
    held = {
        name: torch.from_numpy(a.copy()) for name, a in initializers(tmp_path / "m.onnx").items()
    }
    assert_same_bits(held["layers.dora.gain"], dora.magnitude / dora.weight_norm(), "gain")
    for name, layer in (("dora", dora), ("fp16", half), ("twin", twin)):
        assert_same_bits(held[f"layers.{name}.lora_A"], layer.lora_A.float(), "A")
        assert_same_bits(held[f"layers.{name}.lora_B"], layer.lora_B.float(), "B")
        assert held[f"layers.{name}.scaling"].tolist() == [layer.scaling]
    # A value for one layer leaves its twin as it is.
    other = make_adapters(N, K, 2, (4,), base="nf4")
    y, z = run(tmp_path / "m.onnx", WITH, (x, x, x), **values(other, "layers.fp16", False))[1:]
    assert bool(y.abs().sum() > 0)
    assert bool((z == 0).all())


@pytest.mark.parametrize("ops", FORMS)
def test_constants(ops: str, tmp_path: Path) -> None:
    cases = {
        "bias": make_adapters(N, K, 4, (4,), base="nested", bias=torch.float32),
        "dora": make_adapters(N, K, 4, (4,), base="fp32", dora=(True,)),
    }
    model = Each(**{n: layer_of(c) for n, c in cases.items()}).eval()
    xs = tuple(case.x for case in cases.values())
    report = export(model, xs, tmp_path / "m.onnx", ops=ops, adapters="constants")
    assert report.adapter_inputs == ()
    assert not session(tmp_path / "m.onnx", False).get_overridable_initializers()
    for case, y in zip(cases.values(), run(tmp_path / "m.onnx", FORMS[ops][0], xs), strict=True):
        assert_within(y, *case.bounds()["y"], torch.float32)


def test_a_bias_of_the_adapter_is_a_constant(tmp_path: Path) -> None:
    case = make_adapters(N, K, 4, (4,), base="nf4")
    layer = layer_of(case)
    layer.lora_bias = nn.Parameter(torch.randn(N))
    model = Each(layer=layer).eval()
    with pytest.raises(NotImplementedError, match=r"export: layers\.layer must have no lora_bias"):
        export(model, (case.x,), tmp_path / "m.onnx")
    export(model, (case.x,), tmp_path / "m.onnx", adapters="constants")
    (y,) = run(tmp_path / "m.onnx", WITH, (case.x,))
    own = case.adapters[0]
    wide = torch.cat([case.x, case.x @ own.A.t()], dim=1)
    tall = torch.cat([case.dense(torch.float32), own.s * own.B], dim=1)
    assert_within_budget(y, wide, tall, layer.scaling * layer.lora_bias.detach())


def test_adapters_that_are_off_or_merged(tmp_path: Path) -> None:
    case = make_adapters(N, K, 4, (4,), base="nf4")
    model = Each(layer=layer_of(case)).eval()
    x, path = case.x, tmp_path / "m.onnx"
    with disable_adapters(model):
        report = export(model, (x,), path)
        assert [(n.became, n.why) for n in report.layers] == [
            ("feinwerk::NF4Linear", "its adapter is switched off")
        ]
        assert_same_bits(run(path, WITH, (x,))[0], model(x)[0], "off")
    model.layers["layer"].merge()
    report = export(model, (x,), path)
    assert [(n.became, n.why) for n in report.layers] == [
        ("feinwerk::NF4Linear", "its adapter is merged")
    ]
    with torch.no_grad():
        assert_same_bits(run(path, WITH, (x,))[0], model(x)[0], "merged")


class PeftNet(nn.Module):
    """Two layers that get adapters, and one without."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.q, self.k = nn.Linear(K, N), nn.Linear(N, 20, bias=False)
        if quantized:
            self.q = NF4Linear.from_linear(self.q)
            self.k = NF4Linear.from_linear(self.k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k(self.q(x).relu())


@pytest.mark.parametrize(
    ("quantized", "fused"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.full),
        pytest.param(True, False, marks=pytest.mark.full),
        (True, True),
    ],
)
def test_peft(quantized: bool, fused: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from feinwerk.integrations.peft import fuse

    config = {"target_modules": ["q", "k"], "r": 4, "lora_dropout": 0.1}
    model = peft.get_peft_model(PeftNet(quantized), peft.LoraConfig(**config))
    model.add_adapter("dora", peft.LoraConfig(**config, use_dora=True, use_rslora=True))
    model.add_adapter("more", peft.LoraConfig(**config | {"r": 3}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.2)
    model.eval()
    if fused:
        fuse(model)
    x, path = make_x((3, K), torch.float32), tmp_path / "m.onnx"
    for active in (["default"], ["dora"], ["default", "more"]):
        model.base_model.set_adapter(active)
        report = export(model, (x,), path)
        assert [layer.path for layer in report.layers] == ["q", "k"]
        assert ("q.gain" in report.adapter_inputs) == ("dora" in active)
        (y,) = run(path, WITH, (x,))
        inner = model.get_base_model()
        with torch.no_grad():
            peer, wide = model(x), _peft_truth(inner, x)
        assert_within(y, *wide(peer), torch.float32, str(active))


def _peft_truth(net: Any, x: torch.Tensor) -> Any:
    """The net in fp64 from PEFT's tensors, and a budget around PEFT's own fp32 result."""

    def dense(layer: Any) -> torch.Tensor:
        base = layer.base_layer
        W = (base.dequantize() if isinstance(base, NF4Linear) else base.weight).double()
        whole = W.clone()
        for name in layer.active_adapters:
            A, B = (getattr(layer, f"lora_{side}")[name].weight.double() for side in "AB")
            whole += layer.scaling[name] * B @ A
            if name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[name].weight.double()
                whole *= (magnitude / whole.norm(dim=1))[:, None]
        return whole

    Wq, Wk = dense(net.q), dense(net.k)
    bias = net.q.base_layer.bias.double()
    inner = (x.double() @ Wq.t() + bias).relu()
    truth = inner @ Wk.t()
    # The terms of each sum: an error of the first layer's passes through the second.
    rounding = 4 * 2.0**-24
    first = rounding * (K + 8) ** 0.5 * (x.double().abs() @ Wq.abs().t() + bias.abs())
    budget = first @ Wk.abs().t() + rounding * (N + 8) ** 0.5 * inner.abs() @ Wk.abs().t()
    return lambda peer: (truth, 2 * (peer - truth).abs().max() + budget)


def test_room_in_dense_embeddings_and_conv1d(tmp_path: Path) -> None:
    """And tensors of a wrapper that have a layer's names already."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 32)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.out = nn.Embedding(10, 32), conv1d
            nn.init.normal_(conv1d.bias)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids))

    class Wrapper(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net, self.out = net, nn.Linear(20, 20)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.net(ids)) * 0 + self.net(ids)

    net, ids, path = Net().eval(), torch.tensor([[1, 2, 3]]), tmp_path / "m.onnx"
    room = AdapterRoom(["embed", "out"])
    report = export(Wrapper(net).eval(), (ids,), path, adapters=room, root=net)
    assert {layer.path for layer in report.layers} == {"embed", "out"}
    with torch.no_grad():
        rows, W = net.embed.weight[ids], net.out.weight.t()
        assert_within_budget(run(path, WITH, (ids,))[0], rows, W, net.out.bias)
        A, B = torch.randn(3, 10), torch.randn(32, 3)
        replaced = {"embed.lora_A": A, "embed.lora_B": B, "embed.scaling": torch.ones(1)}
        # (row + a B^T) W^T as one product.
        wide = torch.cat([rows, A.t()[ids]], dim=-1)
        tall = torch.cat([W, (W.double() @ B.double()).float()], dim=1)
        (y,) = run(path, WITHOUT, (ids,), **replaced)
        truth, budget = linear_budget(wide, tall, net.out.bias)
        # And the rounding of the rows themselves, on its way through W.
        size = (rows.abs() + A.t()[ids].abs() @ B.abs().t()).double() @ W.abs().t().double()
        assert_within(y, truth, budget + 4 * 35**0.5 * 2.0**-24 * size, torch.float32)


def test_room_names_layers(tmp_path: Path) -> None:
    model = Each(layer=nf4_linear(make_adapters(N, K, 2).base, None, torch.float32)).eval()
    x = make_x((2, K), torch.float32)
    room = AdapterRoom(["missing"])
    with pytest.raises(ValueError, match=r"target_modules must name linear layers .* 'missing'"):
        export(model, (x,), tmp_path / "m.onnx", adapters=room)
