"""Adapters in a model: which layers, what is trained, merging and the way back, switching off."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_lora_modules import BASES, make, make_base
from torch import nn

from feinwerk import NF4Weight, quantize_model
from feinwerk.nn import (
    Adapter,
    DoRAConv,
    DoRALinear,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    NF4Linear,
    adapter_parameters,
    adapters_of,
    add_adapters,
    dequantize_model,
    disable_adapters,
    mark_trainable,
    merge_adapters,
)
from feinwerk.testing import assert_same_bits, make_x, ulp


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


LINEARS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
EVERYTHING = ["embed", "conv", *LINEARS, "lm_head"]
TOKENS = torch.arange(20).view(2, 10)


def make_model(quantized: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model()
    if quantized:
        quantize_model(model, embeddings=True, skip=())
    return model


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


class TestAdding:
    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (None, LINEARS),
            (["up"], ["layers.0.up", "layers.1.up"]),
            (["layers.1", "embed"], ["embed", "layers.1.up", "layers.1.down"]),
            (["*.down", "conv"], ["conv", "layers.0.down", "layers.1.down"]),
            (EVERYTHING, EVERYTHING),
        ],
    )
    def test_which_layers(self, quantized: bool, targets: Any, expected: list[str]) -> None:
        model = make_model(quantized)
        before = model(TOKENS).detach()
        assert add_adapters(model, 4, lora_alpha=8, target_modules=targets) == expected
        assert list(adapters_of(model)) == expected
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == list(adapter_parameters(model))
        assert len(trained) == 2 * len(expected)
        # The fused product may sum in another order than the layer's own.
        plain = make_model(quantized)
        dequantize_model(plain)
        truth = plain.double()(TOKENS).detach()
        off = (model(TOKENS) - truth).abs().max()
        assert off <= 2 * (before - truth).abs().max() + ulp(truth, torch.float32).max()

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("quantized", [False, True])
    def test_it_learns_and_the_base_stays(self, quantized: bool, dora: bool) -> None:
        model = make_model(quantized)
        add_adapters(model, 4, lora_alpha=8, target_modules=EVERYTHING, dora=dora, dropout=0.1)
        kinds = {type(m) for m in adapters_of(model).values()}
        assert (DoRALinear if dora else LoRALinear) in kinds
        assert (DoRAConv if dora else LoRAConv) in kinds
        before = state(model)
        losses = train(model, 8)
        assert losses[-1] < 0.9 * losses[0]
        for key, value in model.state_dict().items():
            ours = key.rsplit(".", 1)[-1] in ("lora_A", "lora_B", "magnitude")
            assert torch.equal(value, before[key]) != ours, key

    def test_options_reach_the_layers_that_have_them(self) -> None:
        model = make_model()
        add_adapters(
            model, 4, lora_alpha=8, target_modules=EVERYTHING, dropout=0.3, init="gaussian",
            use_rslora=True, dtype=torch.bfloat16, iterations=2,
        )  # fmt: skip
        for name, layer in adapters_of(model).items():
            assert layer.scaling == 4.0
            assert layer.lora_A.dtype == torch.bfloat16
            assert layer.dropout == (0.0 if name == "embed" else 0.3)

    def test_more_layers_later_and_a_shared_one(self) -> None:
        model = make_model()
        model.layers[1] = model.layers[0]
        assert add_adapters(model, 4, lora_alpha=8, target_modules=["up"]) == ["layers.0.up"]
        assert isinstance(model.layers[1].up, Adapter)
        other = make_model()
        other.layers[1].up = other.layers[0].up
        assert add_adapters(other, 4, lora_alpha=8, target_modules=["up"]) == LINEARS[::2]
        assert other.layers[1].up is other.layers[0].up
        assert add_adapters(other, 2, lora_alpha=8, target_modules=["down"]) == LINEARS[1::2]

    def test_a_head_that_is_trained_whole(self) -> None:
        model = make_model()
        add_adapters(model, 4, lora_alpha=8, trainable=["lm_head", "norm"])
        assert model.lm_head.weight.requires_grad
        assert model.norm.bias.requires_grad
        assert not model.embed.weight.requires_grad
        assert mark_trainable(model) == list(adapter_parameters(model))
        assert not model.lm_head.weight.requires_grad

    @pytest.mark.parametrize(
        ("error", "message", "options"),
        [
            (TypeError, "target_modules must be a tuple or list", {"target_modules": "up"}),
            (ValueError, "target_modules must name layers .* got 'q_proj'",
             {"target_modules": ["up", "q_proj"]}),
            (ValueError, "target_modules must name layers .* got 'norm'",
             {"target_modules": ["norm"]}),
            (ValueError, r"layers\.0\.up: LoRALinear: r must be a whole", {"r": 0}),
            (ValueError, r"layers\.0\.up: DoRALinear: lora_bias must be False",
             {"dora": True, "lora_bias": True}),
            (ValueError, "conv: LoRAConv: init must be one of 'default', 'gaussian', got 'pissa'",
             {"target_modules": ["conv", "up"], "init": "pissa"}),
            (ValueError, "embed: LoRAEmbedding: lora_bias must be False",
             {"target_modules": EVERYTHING, "lora_bias": True}),
            (TypeError, "unexpected keyword argument 'rank'", {"rank": 3}),
            (TypeError, "trainable must be a tuple or list", {"trainable": "lm_head"}),
            (ValueError, "also must name parameters of the model, got 'head'",
             {"trainable": ["head"]}),
            (ValueError, r"trainable must not name layers that get an adapter, got 'layers\.0\.up'",
             {"trainable": ["layers.0"]}),
        ],
    )  # fmt: skip
    def test_rejections_change_nothing(self, error: Any, message: str, options: Any) -> None:
        model = make_model()
        before = state(model)
        with pytest.raises(error, match=message):
            add_adapters(model, **{"r": 4, "lora_alpha": 8, **options})
        assert adapters_of(model) == {}
        assert all(p.requires_grad for p in model.parameters())
        for key, value in model.state_dict().items():
            assert_same_bits(value, before[key], key)

    def test_a_weight_that_is_not_finite(self) -> None:
        model = make_model()
        with torch.no_grad():
            model.layers[1].down.weight[0, 0] = torch.nan
        with pytest.raises(
            ValueError, match=r"layers\.1\.down: LoRALinear: base_layer\.weight must"
        ):
            add_adapters(model, 4, lora_alpha=8, init="pissa")
        assert adapters_of(model) == {}
        assert all(p.requires_grad for p in model.parameters())

    def test_more_rejections(self) -> None:
        with pytest.raises(ValueError, match="model must contain the layers to wrap"):
            add_adapters(nn.Linear(3, 3), 4, lora_alpha=8)
        with pytest.raises(ValueError, match="model must contain layers to wrap, got Sequential"):
            add_adapters(nn.Sequential(nn.ReLU()), 4, lora_alpha=8)
        with pytest.raises(ValueError, match="which reads weights past forward, got 'linear1'"):
            add_adapters(nn.TransformerEncoderLayer(8, 2), 4, lora_alpha=8)
        with pytest.raises(ValueError, match="also must name parameters that can be trained"):
            mark_trainable(make_model(quantized=True), ["layers.0.up"])


class TestMerging:
    @pytest.mark.parametrize("into", ["base", "dense"])
    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("base", BASES)
    def test_a_layer_and_the_way_back(self, base: str, dora: bool, into: str) -> None:
        layer = make(dora, make_base(base, 12, 33), lora_bias=not dora)
        x = make_x((5, 33), torch.float32)
        y, before, inner = layer(x).detach(), state(layer), layer.base_layer
        kept = {name: id(t) for name, t in inner.named_parameters()}
        exact = layer.merged_weight()
        # K + r products, here and there, of the sizes |W| and |s| |B| |A|, times the gain.
        W = inner.dequantize() if isinstance(inner, NF4Linear) else inner.weight.detach()
        sizes = (W.t() if base == "conv1d" else W).abs()
        sizes = (
            sizes + abs(layer.scaling) * layer.lora_B.detach().abs() @ layer.lora_A.detach().abs()
        )
        if dora:
            sizes = sizes * layer._gain().detach()[:, None]
        bound = 8 * (33 + 4) ** 0.5 * 2.0**-24 * (x.abs() @ sizes.t()) + 2 * ulp(y, torch.float32)
        report = layer.merge(into)
        assert layer.merged
        stored = layer.base_layer
        dense = stored.dequantize() if isinstance(stored, NF4Linear) else stored.weight
        assert report.max_error == float((dense - exact).abs().max())
        assert isinstance(stored, NF4Linear) == (base in ("nf4", "nested") and into == "base")
        assert (report.max_error > 0) == isinstance(stored, NF4Linear)
        if not isinstance(stored, NF4Linear):
            assert ((layer(x) - y).abs() <= bound).all()
        layer.unmerge()
        assert layer.base_layer is inner
        assert {name: id(t) for name, t in inner.named_parameters()} == kept
        for key, value in layer.state_dict().items():
            assert_same_bits(value, before[key], key)
        assert_same_bits(layer(x).detach(), y)

    def test_dense_is_the_dequantized_base_in_its_dtype(self) -> None:
        layer = make(False, make_base("nested", 12, 33, dtype=torch.bfloat16))
        exact = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight()
        report = layer.merge("dense")
        assert layer.weight.dtype == torch.bfloat16
        off = (layer.weight.float() - exact).abs().max()
        assert abs(float(off) - report.max_error) <= 2.0**-20
        layer.half()
        layer.unmerge()
        assert layer.base_layer.dtype == torch.float16

    def test_tied_weights_keep_theirs(self) -> None:
        base, other = nn.Linear(33, 12), nn.Linear(33, 12)
        other.weight = base.weight
        x = make_x((5, 33), torch.float32)
        before = other(x).detach()
        layer = make(False, base)
        layer.merge()
        assert_same_bits(other(x).detach(), before)
        layer.unmerge()
        assert other.weight is layer.weight

    @pytest.mark.parametrize("into", ["base", "dense"])
    def test_a_model_for_good(self, into: str) -> None:
        model = make_model(quantized=True)
        add_adapters(model, 4, lora_alpha=8, target_modules=EVERYTHING)
        train(model)
        y = model(TOKENS).detach()
        adapters = adapters_of(model)
        weights = {name: layer.merged_weight() for name, layer in adapters.items()}
        reports = merge_adapters(model, into)
        assert list(reports) == EVERYTHING
        assert adapters_of(model) == {}
        for name, exact in weights.items():
            layer: Any = model.get_submodule(name)
            quantized = into == "base" and name != "conv"
            assert hasattr(layer, "dequantize") == quantized
            dense = layer.dequantize() if quantized else layer.weight
            assert reports[name].max_error == float((dense - exact).abs().max())
            if quantized:
                codes = NF4Weight.from_dense(exact).packed
                assert_same_bits(layer.weight.reshape(-1), codes.reshape(-1))
        if into == "dense":
            theirs, truth = model(TOKENS), model.double()(TOKENS)
            off = (y - truth).abs().max()
            assert off <= 2 * (theirs - truth).abs().max() + ulp(truth, torch.float32).max()

    def test_rejections(self) -> None:
        layer = make(False, make_base("nested", 12, 33, bias=False), lora_bias=True)
        before = state(layer)
        with pytest.raises(ValueError, match="LoRALinear: base_layer must have a bias to merge"):
            layer.merge()
        with pytest.raises(ValueError, match='into must be "base" or "dense", got \'bf16\''):
            layer.merge("bf16")
        with pytest.raises(ValueError, match="adapter must be merged before unmerge"):
            layer.unmerge()
        broken = make(True, make_base("nested", 12, 33))
        with torch.no_grad():
            broken.lora_B[3, 2] = torch.inf
        with pytest.raises(ValueError, match="merged weight must be finite"):
            broken.merge()
        assert not broken.merged
        for key, value in layer.state_dict().items():
            assert_same_bits(value, before[key], key)
        good = make(False, make_base("nested", 12, 33))
        good.merge()
        with pytest.raises(ValueError, match="adapter must be unmerged before it is merged"):
            good.merge()
        with pytest.raises(RuntimeError, match="LoRALinear: 0 must be unmerged to load weights"):
            nn.Sequential(good).load_state_dict(nn.Sequential(good).state_dict())
        with pytest.raises(ValueError, match="disable_adapters: 0 must be unmerged"):
            disable_adapters(nn.Sequential(good)).__enter__()
        with pytest.raises(ValueError, match="model must contain adapters"):
            merge_adapters(make_model())
        with pytest.raises(ValueError, match="merge_adapters: 0: merge: merged weight must be"):
            merge_adapters(nn.Sequential(broken))


@pytest.mark.parametrize("dora", [False, True])
def test_switching_off(dora: bool) -> None:
    model = make_model(quantized=True)
    before = model(TOKENS).detach()
    add_adapters(model, 4, lora_alpha=8, target_modules=EVERYTHING, dora=dora)
    train(model)
    y = model(TOKENS).detach()
    with disable_adapters(model):
        assert_same_bits(model(TOKENS).detach(), before)
    with contextlib.suppress(KeyError), disable_adapters(model):
        raise KeyError
    assert_same_bits(model(TOKENS).detach(), y)


def test_an_embedding_alone() -> None:
    layer = LoRAEmbedding(nn.Embedding(20, 32), 4, lora_alpha=8)
    assert list(adapter_parameters(layer)) == ["lora_A", "lora_B"]
