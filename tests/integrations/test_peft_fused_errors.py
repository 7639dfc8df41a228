"""Bad input to fused PEFT layers: errors that name the layer, and nothing half-applied."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import explain
from feinwerk.integrations.peft import FusedLayer, fuse, fused_config, unfuse

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
cases = pytest.importorskip("peft_cases")

X = cases.X
UP = r"base_model\.model\.up: "


def break_rank(layer: Any) -> None:
    layer.lora_B["default"].weight.data = torch.zeros(layer.out_features, 9)


def break_base(layer: Any) -> None:
    layer.lora_A["default"].weight.data = torch.zeros(3, 17)


def break_magnitude(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].weight.data = torch.ones(5)


def break_scaling(layer: Any) -> None:
    layer.scaling["default"] = float("nan")


def break_tensor_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(float("inf"))


BREAKS = {
    break_rank: r"lora_B of adapter 'default' must have shape \(128, 3\).*, got \(128, 9\)",
    break_base: r"lora_A of adapter 'default' must have shape \(r, 64\).*, got \(3, 17\)",
    break_magnitude: r"magnitude of adapter 'default' must have shape \(128,\), got \(5,\)",
    break_scaling: r"scaling of adapter 'default' must be finite, got nan",
    break_tensor_scaling: r"scaling of adapter 'default' must be finite, got inf",
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("base", cases.BASES)
def test_an_adapter_that_does_not_fit(base: str, broken: Any) -> None:
    model = cases.make(base, "dora")
    good = cases.fused(model)
    broken(model.base_model.model.up)
    with pytest.raises(ValueError, match=UP + BREAKS[broken]):
        fuse(model)
    assert not any(isinstance(m, FusedLayer) for m in model.modules())
    broken(good.base_model.model.up)
    for mode in (True, False):
        with pytest.raises(ValueError, match=UP + BREAKS[broken]):
            good.train(mode)(X)
    with pytest.raises(ValueError, match=UP + BREAKS[broken]):
        good(X, adapter_names=["default"] * 4)


def test_input_that_does_not_fit() -> None:
    model = cases.fused(cases.make("nf4"))
    with pytest.raises(ValueError, match=UP + r".*x must have last dimension K = 64"):
        model(torch.ones(2, 63))
    dense = cases.fused(cases.make("dense"))
    rule = r"x must have the base weight's dtype, torch.float32, got torch.bfloat16"
    with pytest.raises(TypeError, match=UP + rule):
        dense(X.bfloat16())
    with pytest.raises(ValueError, match=UP + r".*must be on .* like the other tensors"):
        model.base_model.model.up(torch.ones(2, 64, device="meta"))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "loftq", "mica"])
def test_inits_that_an_nf4_base_cannot_have(init: str) -> None:
    config = fused_config(cases.config_of(r=2))
    config.init_lora_weights = init  # the constructor would ask for what some of them need
    model = cases.make_base("nf4")
    codes = model.up.weight.clone()
    with pytest.raises(ValueError, match=r"up: init_lora_weights must be one of .* over NF4Linear"):
        peft.get_peft_model(model, config)
    assert type(model.up).__name__ == "NF4Linear"
    assert torch.equal(model.up.weight, codes)
    fused = cases.fused(cases.make("nf4"))
    with pytest.raises(ValueError, match=r"up: init_lora_weights must be one of"):
        fused.add_adapter("other", config)
    assert set(fused.base_model.model.up.lora_A) == {"default"}


def test_options_that_peft_would_pass_over_in_4_bit() -> None:
    kasa = importlib.import_module("peft.tuners.lora.config").KasaConfig()
    for base, name in (("bnb", "Linear4bit"), ("nf4", "NF4Linear")):
        config = fused_config(cases.config_of(kasa_config=kasa))
        with pytest.raises(ValueError, match=f"up: kasa_config must not be set over {name}"):
            peft.get_peft_model(cases.make_base(base), config)


def test_only_a_lora_config_is_taken() -> None:
    with pytest.raises(TypeError, match=r"fused_config: config must be a peft.LoraConfig, got IA3"):
        fused_config(peft.IA3Config())


@pytest.mark.parametrize("option", ["alora", "velora", "hook", "replaced", "dropout", "base hook"])
def test_what_is_not_covered_runs_pefts_code_and_says_so(option: str) -> None:
    options: dict[str, Any] = {}
    if option == "alora":
        options = {"alora_invocation_tokens": [1, 2]}
    elif option == "velora":
        velora = importlib.import_module("peft.tuners.lora.config").VeloraConfig()
        options = {"velora_config": velora}
    stock = cases.make("dense", **options)
    layer = stock.base_model.model.up
    if option == "hook":
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    elif option == "replaced":
        layer.lora_B["default"] = nn.Sequential(layer.lora_B["default"])
        layer.lora_B["default"].weight = layer.lora_B["default"][0].weight
    elif option == "dropout":
        layer.lora_dropout["default"] = nn.AlphaDropout(0.0)
    elif option == "base hook":
        layer.base_layer.register_forward_pre_hook(lambda *_: None)
    ours = cases.fused(stock)
    row = explain(ours).rows[0]
    assert (row.path, row.op) == ("peft", "")
    assert {
        "alora": "ALoraLinearVariant is not fused", "velora": "VeloraLinearVariant is not fused",
        "hook": "hooks", "replaced": "not a plain Linear", "dropout": "dropout is a AlphaDropout",
        "base hook": "the base layer has hooks",
    }[option] in row.why  # fmt: skip
    assert torch.equal(ours.base_model.model.up(X), layer(X))


def test_an_input_that_is_left_to_peft_is_noted() -> None:
    model = cases.fused(cases.make("dense")).double()
    assert explain(model).rows[0].why == "the base weight is torch.float64"
    model.float()
    assert explain(model).rows[0].path == "fused"
    up = model.base_model.model.up
    deep = X.view(1, 1, 1, 4, 64)
    assert up(deep).shape == (1, 1, 1, 4, 128)
    row = explain(model).rows[0]
    assert (row.path, row.why) == ("peft", "the last x had 5 dimensions")
    up(X)
    assert explain(model).rows[0].path == "fused"


def test_repacked_bitsandbytes_bytes_are_left_to_peft() -> None:
    dense = cases.make_base("dense")
    cases.to_bitsandbytes(dense)
    model = cases.fused(peft.get_peft_model(dense, cases.config_of()))
    layer = model.base_model.model.up
    with torch.no_grad(), model.disable_adapter():
        model.eval()(X)  # the base alone does not go through bitsandbytes, which would repack here
    assert explain(model).rows[0].path == "fused"
    if not layer.base_layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on CPUs with AVX-512 BF16 only")
    with torch.no_grad():
        layer.base_layer(X)
        assert layer.base_layer.weight.quant_state.packing_format_for_cpu
        row = explain(model).rows[0]
        assert row.path == "peft"
        assert row.why == "bitsandbytes has repacked the base weight for its own CPU kernel"
        stock = copy.deepcopy(model)
        unfuse(stock)
        assert torch.equal(layer(X), stock.base_model.model.up(X))


def test_fp4_is_left_to_peft() -> None:
    base = nn.Module()
    base.up = bnb.nn.Linear4bit(64, 128, quant_type="fp4")
    base.is_loaded_in_4bit = True
    base.to("cpu")
    model = peft.get_peft_model(base, fused_config(peft.LoraConfig(target_modules=["up"])))
    row = explain(model).rows[0]
    assert (row.path, row.why) == ("peft", "the base weight is fp4, not nf4")
    stock = copy.deepcopy(model)
    unfuse(stock)
    up, theirs = model.base_model.model.up, stock.base_model.model.up
    assert torch.equal(up(X.clone().requires_grad_()), theirs(X.clone().requires_grad_()))
