"""What an exported file holds: the model's bytes, once; and what the export leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_exports import FORMS, WITH, WITHOUT, Each, initializers, nf4_linear, nodes, run, session
from torch import nn

import feinwerk
from feinwerk import NF4Weight
from feinwerk.nn import DoRALinear, LoRALinear, NF4Embedding, NF4Linear
from feinwerk.onnx import AdapterRoom, export
from feinwerk.testing import assert_same_bits, assert_within_budget, make_weight, make_x


class Tied(nn.Module):
    """A table that is also the head, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = NF4Weight.from_dense(torch.randn(40, 64))
        self.embed = NF4Embedding.from_weight(weight)
        self.head = NF4Linear.from_weight(self.embed.nf4_weight)
        self.again = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 64)), 4, lora_alpha=8)
        nn.init.normal_(self.again.lora_B, std=0.1)
        self.same = self.again

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.same(self.again(self.embed(ids))))


@pytest.mark.parametrize("ops", FORMS)
def test_bytes_and_ties(ops: str, tmp_path: Path) -> None:
    model, path = Tied().eval(), tmp_path / "m.onnx"
    ids = torch.tensor([[1, 2, 3]])
    before = dict(model.named_modules(remove_duplicate=False))
    report = export(model, (ids,), path, ops=ops)
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert report.inputs == ("ids",)
    held = initializers(path)
    tensors = {"embed": model.embed, "again": model.again.base_layer}
    for name, layer in tensors.items():
        expected = {"packed": layer.weight.reshape(-1), "absmax": layer.absmax}
        expected |= {n: getattr(layer, n) for n in ("nested_absmax", "nested_codebook")}
        for part, tensor in expected.items():
            if ops == "contrib" and name == "again" and part != "packed":
                continue  # expanded
            if (name, part) == ("again", "nested_codebook"):
                continue  # equal to the table's, and written once
            array = held[f"{name}.{part}"]
            assert array.dtype == tensor.detach().numpy().dtype
            assert np.array_equal(array, tensor.detach().numpy())
    # The codes once, however many nodes read them.
    packed = [n for n, array in held.items() if array.dtype == np.uint8 and array.size >= 1280]
    assert sorted(packed) == ["again.packed", "embed.packed"]
    assert [n for n in report.adapter_inputs] == [
        f"again.{p}" for p in ("lora_A", "lora_B", "scaling")
    ]
    if ops == "contrib":
        absmax = held["again.absmax.expanded"]
        assert absmax.dtype == np.float32
        decoded = model.again.base_layer.dequantize().abs().view(-1, 64).amax(dim=1)
        assert np.array_equal(absmax, decoded.numpy())
    if ops == "feinwerk":
        assert set(nodes(path)) == {"embed", "again", "again_1", "head"}
    with torch.no_grad():
        peer = model(ids)
        inner = model.same(model.again(model.embed(ids)))
    for by in FORMS[ops]:
        (y,) = run(path, by, (ids,))
        if by == WITH:
            assert_same_bits(y, peer, by)
        else:  # two layers before the last: their rounding passes through it
            W = model.head.dequantize()
            difference = (y - peer).abs().double()
            size = 64 * inner.abs().max() * W.abs().max()
            assert difference.max() <= 3 * 4 * 8 * 2.0**-24 * float(size)


def test_external_data(tmp_path: Path) -> None:
    for ops in FORMS:
        weight = make_weight(130, 320, double_quant=True)
        model = Each(layer=nf4_linear(weight, None, torch.float32)).eval()
        path, x = tmp_path / f"{ops}.onnx", make_x((2, 320), torch.float32)
        report = export(
            model, (x,), path, ops=ops, external_data=True, adapters=AdapterRoom(["layer"])
        )
        assert set(report.files) == {f"{ops}.onnx", f"{ops}.onnx.data"}
        assert report.files[f"{ops}.onnx.data"] >= weight.packed.numel()
        assert report.files[path.name] < 20_000
        assert report.size == sum(file.stat().st_size for file in tmp_path.glob(f"{ops}.onnx*"))
        (y,) = run(path, FORMS[ops][-1], (x,))
        assert_within_budget(y, x, weight.dense())


def test_large_models_get_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feinwerk.onnx import export_model

    monkeypatch.setattr(export_model, "EXTERNAL_ABOVE", 10_000)
    model = Each(layer=NF4Linear(320, 130)).eval()
    report = export(model, (torch.zeros(1, 320),), tmp_path / "m.onnx")
    assert set(report.files) == {"m.onnx", "m.onnx.data"}


def test_metadata_and_functions(tmp_path: Path) -> None:
    weight = make_weight(48, 96, double_quant=True)
    layer = DoRALinear(nf4_linear(weight, None, torch.float32), 4, lora_alpha=8)
    model = Each(plain=nf4_linear(weight, None, torch.float32), dora=layer).eval()
    x, path = make_x((2, 96), torch.float32), tmp_path / "m.onnx"
    lines: list[str] = []
    report = export(model, (x, x), path, metadata={"of": "test"}, progress=lines.append)
    assert len(lines) == 4
    proto = onnx.load(str(path))
    found = {entry.key: entry.value for entry in proto.metadata_props}
    assert found["feinwerk.version"] == feinwerk.__version__
    assert found["feinwerk.ops"] == "feinwerk"
    assert json.loads(found["feinwerk.adapters"]) == ["default"]
    assert json.loads(found["feinwerk.adapter_inputs"]) == list(report.adapter_inputs)
    assert found["of"] == "test"
    assert {(f.domain, f.name, f.overload) for f in proto.functions} == {
        ("feinwerk", "NF4Linear", ""), ("feinwerk", "NF4LoraLinear", ""),
    }  # fmt: skip
    assert all(node.domain == "" for function in proto.functions for node in function.node)
    # Old runtimes read it, and it tells nothing of the machine that wrote it.
    assert proto.ir_version == 9
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    text = str(report)
    assert "feinwerk::NF4LoraLinear" in text
    assert "DoRA r=4" in text
    assert "m.onnx" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_kinds_of_absmax_in_one_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nodes of one operation that differ: told apart by overload, filled up with zeros."""
    weights = [make_weight(48, 96, double_quant=double) for double in (True, True, False)]
    biases = [None, torch.randn(48).to(dtype), None]
    layers = [nf4_linear(w, b, dtype) for w, b in zip(weights, biases, strict=True)]
    model = Each(**{f"l{i}": layer for i, layer in enumerate(layers)}).eval()
    xs = tuple(make_x((2, 96), dtype, seed=i) for i in range(3))
    report = export(model, xs, tmp_path / "m.onnx")
    assert report.ir_version == 10
    assert "older" in report.notes[0]
    overloads = {name: node.overload for name, node in nodes(tmp_path / "m.onnx").items()}
    assert overloads == {"layers.l0": "", "layers.l1": "", "layers.l2": "plain"}
    with torch.no_grad():
        expected = model(*xs)
    for y, peer in zip(run(tmp_path / "m.onnx", WITH, xs), expected, strict=True):
        assert_same_bits(y + 0, peer + 0, "with the library")
    got = run(tmp_path / "m.onnx", WITHOUT, xs)
    for y, x, weight, bias in zip(got, xs, weights, biases, strict=True):
        assert_within_budget(y, x, weight.dense(dtype), bias)


def test_a_layer_alone_and_keyword_inputs(tmp_path: Path) -> None:
    weight = make_weight(48, 96)
    layer, x = nf4_linear(weight, None, torch.float32), make_x((2, 5, 96), torch.float32)
    report = export(layer, (x[:1],), tmp_path / "m.onnx", output_names=["y"], input_names=["rows"])
    assert (report.inputs, report.outputs) == (("rows",), ("y",))
    assert list(nodes(tmp_path / "m.onnx")) == ["layer"]
    assert_within_budget(run(tmp_path / "m.onnx", WITH, (x,))[0], x, weight.dense())

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, ids: torch.Tensor, *, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + ids[..., None]

    model = Keywords().eval()
    example = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 96)
    report = export(model, example[:1], tmp_path / "k.onnx", kwargs={"x": example[1]})
    assert report.inputs == ("ids", "x")
    zeros = torch.zeros(2, 5, dtype=torch.int64)
    assert_within_budget(run(tmp_path / "k.onnx", WITH, (zeros, x))[0], x, weight.dense())


def test_four_dimensions_and_none(tmp_path: Path) -> None:
    """K stays a number of the file's, and the other dimensions are free."""
    weight = make_weight(8, 96)
    layer = nf4_linear(weight, None, torch.float32)
    for ops in FORMS:
        path = tmp_path / f"{ops}.onnx"
        export(layer, (torch.zeros(1, 1, 1, 96),), path, ops=ops)
        shape = session(path, True).get_inputs()[0].shape
        assert shape[-1] == 96
        assert not any(isinstance(size, int) for size in shape[:-1])
        for sizes in ((2, 3, 1, 96), (0, 1, 2, 96)):
            x = make_x(sizes, torch.float32)
            assert_within_budget(run(path, FORMS[ops][0], (x,))[0], x, weight.dense())


def test_a_block_size_that_matmulbnb4_lacks(tmp_path: Path) -> None:
    weights = make_weight(8, 1024, blocksize=512), make_weight(8, 1024, blocksize=256)
    layers = {f"l{w.blocksize}": nf4_linear(w, None, torch.float32) for w in weights}
    x = make_x((2, 1024), torch.float32)
    report = export(Each(**layers).eval(), (x, x), tmp_path / "m.onnx", ops="contrib")
    assert [(n.became, n.why) for n in report.layers] == [
        ("standard operators", "MatMulBnb4 has no blocks of 512"),
        ("com.microsoft::MatMulBnb4", ""),
    ]
    for y, weight in zip(run(tmp_path / "m.onnx", WITHOUT, (x, x)), weights, strict=True):
        assert_within_budget(y, x, weight.dense())


def test_importing_the_export_imports_no_onnx() -> None:
    code = (
        "import sys, feinwerk.onnx as o; o.export; o.ExportReport; o.AdapterRoom; "
        "print(sorted({'onnx', 'onnxscript', 'onnx_ir', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
