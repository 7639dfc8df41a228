"""feinwerk.onnx.export: every layer in every form, against the budget and against torch's bits."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx_exports import FORMS, REFERENCE, WITH, Each, layer_of, nf4_linear, run
from torch import nn

import feinwerk
from feinwerk.nn import DoRAConv, DoRAEmbedding, LoRAConv, LoRAEmbedding, NF4Embedding
from feinwerk.onnx import export
from feinwerk.testing import (
    assert_same_bits,
    assert_within,
    assert_within_budget,
    make_weight,
    make_x,
)
from feinwerk.testing.adapters import AdapterCase, make_adapters

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def adapter_cases(dtype: torch.dtype, rows: int) -> dict[str, AdapterCase]:
    """LoRA and DoRA over both kinds of absmax and a dense weight; sizes that no block divides."""
    own = {"dtype": dtype, "seed": rows}
    return {
        "plain": make_adapters(33, 130, rows, (4,), base="nf4", bias=dtype, **own),
        "nested": make_adapters(48, 96, rows, (8,), base="nested", **own),
        "dora": make_adapters(31, 97, rows, (3,), base="nested", dora=(True,), bias=dtype, **own),
        "dense": make_adapters(20, 64, rows, (4,), base=NAMES[dtype], bias=dtype, **own),
        "dense_dora": make_adapters(17, 33, rows, (5,), base=NAMES[dtype], dora=(True,), **own),
    }


# Where "contrib" has no operator of its own, it writes what "portable" writes.
SOME_FORMS = ["feinwerk", pytest.param("contrib", marks=pytest.mark.full), "portable"]
# Every pair in `make test-full`.
PAIRS = [
    pytest.param(
        ops, dtype, id=f"{ops}-{name}",
        marks=() if ops == "feinwerk" or name == "fp32" else pytest.mark.full,
    )
    for ops in FORMS for dtype, name in NAMES.items()
]  # fmt: skip


@pytest.mark.parametrize(("ops", "dtype"), PAIRS)
def test_linear_layers(ops: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {
        "odd": make_weight(31, 97, blocksize=32),
        "quantized": make_weight(130, 320, double_quant=True),
        "large_blocks": make_weight(48, 576, blocksize=4096, double_quant=True),
    }
    biases = {"odd": torch.randn(31).to(dtype), "quantized": None, "large_blocks": None}
    layers: dict[str, nn.Module] = {n: nf4_linear(w, biases[n], dtype) for n, w in weights.items()}
    cases = adapter_cases(dtype, 3)
    layers |= {name: layer_of(case) for name, case in cases.items()}
    model = Each(**layers).eval()
    example = tuple(make_x((2, layer.in_features), dtype) for layer in layers.values())
    report = export(model, example, tmp_path / "m.onnx", ops=ops)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=ops != "contrib")
    # Other sizes than the example's: the number of rows is free.
    inputs = [make_x((3, w.K), dtype) for w in weights.values()]
    inputs += [case.x for case in cases.values()]
    contrib = {n.path for n in report.layers if n.became == "com.microsoft::MatMulBnb4"}
    for by in FORMS[ops]:
        if by == REFERENCE and (dtype is torch.bfloat16 or ops == "feinwerk"):
            # numpy has no bfloat16; the evaluator mixes the functions of both kinds of absmax up.
            continue
        got = dict(zip(layers, run(tmp_path / "m.onnx", by, tuple(inputs)), strict=True))
        for (name, weight), x in zip(weights.items(), inputs, strict=False):
            if f"layers.{name}" in contrib and dtype is torch.float16:
                continue  # MatMulBnb4 itself does not round W to fp16: nothing of ours to test
            assert_within_budget(got[name], x, weight.dense(dtype), biases[name])
        for name, case in cases.items():
            # MatMulBnb4 rounds its product to x's dtype before the adapter is added.
            rounds_first = f"layers.{name}" in contrib and dtype is torch.float16
            truth, budget = case.bounds(triton=rounds_first)["y"]
            assert_within(got[name], truth, budget, dtype, f"{name}, {by}")
        if by == WITH:
            with torch.no_grad():
                expected = dict(zip(layers, model(*inputs), strict=True))
            for name in ("odd", "quantized", "large_blocks", "plain", "nested", "dora"):
                assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("base", ["nf4", "nested"])
def test_functions_in_the_reference_evaluator(base: str, tmp_path: Path) -> None:
    weight = make_weight(33, 130, double_quant=base == "nested")
    bias = torch.randn(33)
    lora, dora = (make_adapters(31, 97, 3, (3,), base=base, dora=(d,)) for d in (False, True))
    torch.manual_seed(0)
    table = NF4Embedding.from_embedding(nn.Embedding(50, 33), double_quant=base == "nested")
    layers = {"own": nf4_linear(weight, bias, torch.float32), "table": table}
    model = Each(**layers, lora=layer_of(lora), dora=layer_of(dora)).eval()
    ids = torch.arange(40).view(4, 10)
    inputs = make_x((3, 130), torch.float32), ids, lora.x, dora.x
    report = export(model, inputs, tmp_path / "m.onnx")
    kinds = ("NF4Linear", "NF4Embedding", "NF4LoraLinear", "NF4LoraLinear")
    assert [n.became for n in report.layers] == [f"feinwerk::{kind}" for kind in kinds]
    y, rows, *adapted = run(tmp_path / "m.onnx", REFERENCE, inputs)
    assert_within_budget(y, inputs[0], weight.dense(), bias)
    assert_same_bits(rows, table(ids), "rows")
    for case, got in zip((lora, dora), adapted, strict=True):
        assert_within(got, *case.bounds()["y"], torch.float32)


@pytest.mark.parametrize("ops", SOME_FORMS)
def test_embeddings_and_convolutions(ops: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tables = {
        "plain": NF4Embedding.from_embedding(nn.Embedding(50, 33), double_quant=False),
        "quantized": NF4Embedding.from_embedding(nn.Embedding(41, 96)),
        "fp16": NF4Embedding.from_embedding(nn.Embedding(9, 32, dtype=torch.float16)),
    }
    adapted: dict[str, LoRAEmbedding] = {
        "lora": LoRAEmbedding(nn.Embedding(50, 33), 4, lora_alpha=6),
        "dora": DoRAEmbedding(NF4Embedding.from_embedding(nn.Embedding(50, 40)), 4, lora_alpha=6),
    }
    convs = {
        "conv": LoRAConv(nn.Conv2d(3, 8, 3, padding=1), 4, lora_alpha=6),
        "dora_conv": DoRAConv(nn.Conv1d(3, 8, 3, bias=False), 4, lora_alpha=6),
    }
    for layer in adapted.values():
        nn.init.normal_(layer.lora_A)
    for conv in convs.values():
        nn.init.normal_(conv.lora_B)
    model = Each(**tables, **adapted, **convs).eval()
    images = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 9)
    example = *(torch.zeros(1, 2, dtype=torch.int64) for _ in range(5)), *images
    export(model, example, tmp_path / "m.onnx", ops=ops)
    tokens = [torch.randint(0, 9, (3, 4)) for _ in range(5)]
    for by in FORMS[ops]:
        if by == REFERENCE and ops == "feinwerk":
            continue  # the tables differ in their kind of absmax
        got = run(tmp_path / "m.onnx", by, (*tokens, *images))
        for (name, table), ids, rows in zip(tables.items(), tokens, got, strict=False):
            assert_same_bits(rows, table(ids), f"{name}, {by}")
        for layer, ids, rows in zip(adapted.values(), tokens[3:], got[3:], strict=False):
            x, W = _as_product(layer, ids)
            assert_within_budget(rows, x, W)
        for conv, image, y in zip(convs.values(), images, got[5:], strict=True):
            # The exporter's own operators, so torch's own error counts.
            apply = nn.functional.conv1d if image.dim() == 3 else nn.functional.conv2d
            W, padding = conv.merged_weight().detach().double(), conv._conv.padding
            with torch.no_grad():
                peer = conv(image)
            truth = apply(image.double(), W, padding=padding)
            if conv.bias is not None:
                truth = truth + conv.bias.detach().double()[:, None, None]
            size = apply(image.double().abs(), W.abs(), padding=padding)
            rounding = 4 * W[0].numel() ** 0.5 * 2.0**-24 * size
            budget = 2 * (peer - truth).abs().max() + rounding
            assert_within(y, truth, budget, torch.float32, by)


def _as_product(layer: LoRAEmbedding, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One product for gain (row + s a B^T): [row, a] gain [I, s B]^T."""
    with torch.no_grad():
        rows, a = layer.base_layer(ids), layer.lora_A.t()[ids]
        W = torch.cat([torch.eye(rows.shape[-1]), layer.scaling * layer.lora_B], dim=1)
        gain = layer._gain()
        return torch.cat([rows, a], dim=-1), W if gain is None else gain[:, None] * W


class Calls(nn.Module):
    """A forward that calls the operations itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = make_weight(48, 96, double_quant=True)
        for name, tensor in zip(
            ("packed", "absmax", "scale", "codebook", "offset"), self.weight.tables, strict=True
        ):
            self.register_buffer(name, tensor)
        self.case = make_adapters(48, 96, 3, (4,), base="nested", dora=(True,))
        adapter = self.case.adapters[0]
        for name in ("A", "B", "magnitude"):
            self.register_buffer(f"lora_{name}", getattr(adapter, name))
        self.register_buffer("norm", adapter.magnitude * 0.75)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nested = (self.scale, self.codebook, self.offset)
        tables = (self.packed, self.absmax, *nested)
        sizes = {"N": 48, "K": 96}
        y = feinwerk.nf4_linear(x, self.packed, self.absmax, None, *nested, **sizes)
        dense = feinwerk.nf4_dequantize(*tables, shape=(48, 96), dtype=torch.float16)
        rows = feinwerk.nf4_embedding(ids, *tables, **sizes)
        lora = feinwerk.lora_linear(
            x, self.packed, self.lora_A, self.lora_B, absmax=self.absmax, nested_absmax=self.scale,
            nested_codebook=self.codebook, nested_offset=self.offset, scaling=0.5,
        )  # fmt: skip
        dora = feinwerk.dora_linear(
            x, rows.float(), self.lora_A, self.lora_B, self.lora_magnitude, weight_norm=self.norm,
            scaling=0.5,
        )  # fmt: skip
        return y, dense, rows, lora, dora


@pytest.mark.parametrize("ops", SOME_FORMS)
def test_calls_in_a_forward(ops: str, tmp_path: Path) -> None:
    model = Calls().eval()
    x, ids = make_x((3, 96), torch.float32), torch.arange(48)
    shapes = {"x": {0: "rows"}, "ids": {}}
    report = export(model, (x, ids), tmp_path / "m.onnx", ops=ops, dynamic_shapes=shapes)
    assert {layer.was for layer in report.layers} == {"a bare call"}
    assert report.adapter_inputs == ()
    W = model.weight.dense()
    A, B = (getattr(model, f"lora_{name}") for name in "AB")
    gain = model.lora_magnitude / model.norm
    for by in FORMS[ops]:
        y, dense, rows, lora, dora = run(tmp_path / "m.onnx", by, (x, ids))
        assert_within_budget(y, x, W)
        assert_same_bits(dense, model.weight.dense(torch.float16), by)
        assert_same_bits(rows, W, by)
        # scaling (x A^T) B^T as more columns of x and W.
        wide, tall = torch.cat([x, x @ A.t()], dim=1), torch.cat([W, 0.5 * B], dim=1)
        assert_within_budget(lora, wide, tall)
        assert_within_budget(dora, wide, gain[:, None] * tall)
