"""What fused PEFT layers remember, and what may change under it: merging, hotswap, DoRA's norms."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import NF4Weight, dequantize_model, explain
from feinwerk.integrations.peft import fuse, invalidate, unfuse
from feinwerk.nn import NF4Linear
from feinwerk.nn.merge import merged_weight
from feinwerk.testing import assert_same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
cases = pytest.importorskip("peft_cases")
hotswap = pytest.importorskip("peft.utils.hotswap")

X = cases.X
layers = cases.layers


def norms(model: nn.Module) -> list[dict[str, Any]]:
    return [layer.norms._adapters for layer in layers(model)]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", cases.METHODS)
def test_merging_into_a_dense_base_is_pefts(method: str, safe: bool) -> None:
    stock = cases.make("dense", method)
    ours = cases.fused(stock)
    double = cases.in_double(stock)
    with torch.no_grad():
        for model in (ours, stock):
            model.merge_adapter(safe_merge=safe)
        assert_same_bits(ours(X), stock(X))
        for model in (ours, stock):
            model.unmerge_adapter()
        for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
            assert_same_bits(a, b)
        cases.assert_output_near(ours(X), double, X)
        ours.merge_adapter(safe_merge=safe)
        with ours.disable_adapter():
            ours(X)  # PEFT unmerges here
            assert not ours.base_model.model.up.merged
        for name in ("up", "down"):
            a, b = (getattr(m.base_model.model, name) for m in (ours, stock))
            assert_same_bits(a.get_delta_weight("default"), b.get_delta_weight("default"))
        stock.merge_adapter(safe_merge=safe)
        stock.unmerge_adapter()
        merged, again = (m.merge_and_unload(safe_merge=safe) for m in (stock, ours))
        assert type(again.up) is nn.Linear
        assert_same_bits(again(X), merged(X))


@pytest.mark.parametrize("method", cases.METHODS)
def test_merging_into_nf4_requantizes_reports_and_comes_back_exactly(method: str) -> None:
    model = cases.fused(cases.two_adapters("nf4", method)).eval()
    dense = copy.deepcopy(model)
    dequantize_model(dense, torch.float32)
    bases = [layer.base_layer for layer in layers(model)]
    before = [{k: v.clone() for k, v in base.state_dict().items()} for base in bases]
    parameters = [base.weight for base in bases]
    with torch.no_grad():
        y = model(X)
        with pytest.warns(UserWarning, match="re-quantizes"):
            model.merge_adapter(adapter_names=["default"])
        with pytest.warns(UserWarning, match="re-quantizes"):
            model.merge_adapter(adapter_names=["other"], safe_merge=True)
        dense.merge_adapter(adapter_names=["default", "other"])
        for layer, other in zip(layers(model), layers(dense), strict=True):
            exact = other.base_layer.weight
            stored = layer.base_layer.dequantize(torch.float32)
            report = layer.merge_report
            # PEFT's sum and ours differ by a few roundings of the largest element.
            off = 8 * 2.0**-24 * float(exact.abs().max())
            assert report.max_error == pytest.approx(float((stored - exact).abs().max()), abs=off)
            error, size = float((stored - exact).norm()), float(exact.norm())
            off *= exact.numel() ** 0.5 / size
            assert report.relative_error == pytest.approx(error / size, abs=off)
            if method == "lora":  # both from the original codes, quantized once
                total = layer.nf4_merge.kept.weight
                for name in ("default", "other"):
                    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                    total = merged_weight(total, A, B, scaling=layer.scaling[name])
                again = NF4Weight.from_dense(total)
                assert_same_bits(layer.base_layer.weight.view(-1), again.packed.view(-1))
        assert "re-quantizing added max error" in str(explain(model))
        with pytest.raises(ValueError, match="must be unmerged before unfuse"):
            unfuse(model)
        model.unmerge_adapter()
        assert all(layer.merge_report is None for layer in layers(model))
        for base, state, parameter in zip(bases, before, parameters, strict=True):
            assert base.weight is parameter
            for key, value in base.state_dict().items():
                assert_same_bits(value, state[key], key)
        assert_same_bits(model(X), y)
        with pytest.warns(UserWarning, match="re-quantizes"):
            merged = model.merge_and_unload(adapter_names=["default"])
    assert type(merged.up) is NF4Linear


def test_merging_a_lora_bias_into_nf4() -> None:
    model = cases.fused(cases.make("nf4", lora_bias=True)).eval()
    layer = model.base_model.model.up
    bias = layer.base_layer.bias
    with pytest.warns(UserWarning, match="re-quantizes"):
        layer.merge()
    extra = layer.scaling["default"] * layer.lora_B["default"].bias
    assert_same_bits(layer.base_layer.bias, bias + extra)
    layer.unmerge()
    assert layer.base_layer.bias is bias
    bare = cases.fused(cases.make("nf4", lora_bias=True, sizes={"bias": False}))
    codes = bare.base_model.model.up.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"up: the base layer must have a bias"):
        bare.merge_adapter()
    assert_same_bits(bare.base_model.model.up.base_layer.weight, codes)


@pytest.mark.parametrize("method", cases.METHODS)
def test_merging_a_broken_adapter_into_nf4_changes_nothing(method: str) -> None:
    model = cases.fused(cases.make("nf4", method))
    layer = model.base_model.model.up
    before = layer.base_layer.weight.clone()
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"base_model\.model\.up: .*finite"):
        layer.merge()
    assert not layer.merged
    assert_same_bits(layer.base_layer.weight, before)


def test_merging_over_bitsandbytes_is_pefts_own() -> None:
    ours = cases.fused(cases.make("bnb"))
    stock = cases.make("bnb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.merge_adapter()
        stock.merge_adapter()
    for a, b in zip(layers(ours), layers(stock), strict=True):
        assert_same_bits(a.base_layer.weight.data, b.base_layer.weight.data)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_hotswap(tmp_path: Path, base: str, method: str, prepared: bool) -> None:
    other = cases.make(base, method, r=2, lora_alpha=7)
    cases.randomize(other, seed=8)
    other.save_pretrained(tmp_path)
    stock = cases.make(base, method)
    ours = cases.fused(stock)
    for model in (ours, stock):
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
        model.eval()
    fuse(ours)
    with torch.no_grad():
        for model in (ours, stock):  # the norms of the first adapter are known by now
            model(X)
            if method == "lora":
                hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
            else:  # PEFT's file reader names no magnitude here: give it the tensors
                state = {k: v for k, v in other.state_dict().items() if "lora_" in k}
                hotswap.hotswap_adapter_from_state_dict(
                    model, state, "default", other.peft_config["default"]
                )
        cases.assert_output_near(ours(X), cases.in_double(other), X)
        cases.assert_output_near(ours(X), cases.in_double(stock), X)


def test_hotswap_of_a_compiled_model_does_not_recompile(tmp_path: Path) -> None:
    other = cases.make("nf4", r=2, lora_alpha=7)
    cases.randomize(other, seed=8)
    other.save_pretrained(tmp_path)
    torch._dynamo.reset()
    model = cases.fused(cases.make("nf4")).eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        before = compiled(X)
        hotswap.hotswap_adapter(compiled, tmp_path, adapter_name="default")
        assert not torch.equal(compiled(X), before)
        cases.assert_output_near(compiled(X), cases.in_double(other), X)


def test_norms_are_kept_only_where_they_are_certain() -> None:
    model = cases.fused(cases.make("nf4", "dora", lora_dropout=0.1))
    layer = model.base_model.model.up
    part = layer.lora_B["default"].weight

    def fresh(x: torch.Tensor) -> torch.Tensor:
        return copy.deepcopy(model)(x)  # a copy remembers nothing

    model.train()
    cases.run(model, X)
    model.eval()
    cases.run(model, X)
    assert norms(model) == [{}, {}]  # gradients were enabled
    with torch.no_grad():
        y = model(X)
        kept = [entry["default"] for entry in norms(model)]
        for (_, sketch, norm), one in zip(kept, layers(model), strict=True):
            assert norm.shape == (one.out_features,)
            assert sketch.numel() == 2 * one.r["default"]
        assert_same_bits(model(X), y)
        for entry, (_, _, norm) in zip(norms(model), kept, strict=True):
            assert entry["default"][2] is norm

        for write in (
            lambda: part.data.mul_(2),  # no version counter sees these
            lambda: part.data[3].fill_(0.7),
            lambda: layer.lora_A["default"].weight.data.copy_(
                layer.lora_A["default"].weight.data.flip(1)
            ),
            lambda: layer.lora_A["default"].weight.data[0, 0].add_(0.5),
            lambda: layer.scaling.update(default=0.25),
            lambda: layer.set_scale("default", 3.0),
            lambda: layer.lora_magnitude_vector["default"].weight.data.mul_(1.5),
        ):
            before = model(X)
            write()
            assert not torch.equal(model(X), before)
            assert_same_bits(model(X), fresh(X))

        for forget in (
            lambda: model.train().eval(),
            lambda: model.load_state_dict(model.state_dict()),
            lambda: model.set_adapter("default"),
            lambda: invalidate(model),
            lambda: model.bfloat16().float(),
        ):
            model(X)
            assert all(norms(model))
            forget()
            assert norms(model) == [{}, {}]


@pytest.mark.parametrize("base", cases.BASES)
def test_the_norm_of_the_base_is_computed_once(base: str) -> None:
    model = cases.fused(cases.make(base, "dora"))
    model(X)
    kept = [layer.norms._base for layer in layers(model)]
    for mode in (True, False):
        model.train(mode)(X)
        model.set_adapter("default")
        with torch.no_grad():
            model(X)
    for layer, norm in zip(layers(model), kept, strict=True):
        assert layer.norms._base is norm
        assert norm.shape == (layer.out_features,)


def test_the_norm_of_the_base_follows_its_weight() -> None:
    model = cases.fused(cases.make("dense", "dora")).eval()
    linear = model.base_model.model.up.base_layer
    with torch.no_grad():
        model(X)
        linear.weight.mul_(2)  # the version counter sees this
        assert_same_bits(model(X), copy.deepcopy(model)(X))
        linear.weight = nn.Parameter(linear.weight * 3, requires_grad=False)
        assert_same_bits(model(X), copy.deepcopy(model)(X))
        linear.weight.data.mul_(0.5)  # and nothing sees this: invalidate is for it
        assert not torch.equal(model(X), copy.deepcopy(model)(X))
        invalidate(model)
        assert_same_bits(model(X), copy.deepcopy(model)(X))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop"])
def test_the_norm_in_training_is_fresh_after_every_step(name: str) -> None:
    model = cases.fused(cases.make("nf4", "dora"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, name)(trained, lr=0.05)
    for mode in (True, False, True):  # some train in eval mode
        model.train(mode)
        for _ in range(3):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_same_bits(model(X), copy.deepcopy(model)(X))
            with torch.no_grad():
                assert_same_bits(model(X), copy.deepcopy(model)(X))
