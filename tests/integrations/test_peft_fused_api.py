"""Everything that PEFT does with its layers goes on working on fused ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from feinwerk import explain, quantize_model
from feinwerk.integrations.peft import FusedLinear, fuse, fused_config, unfuse
from feinwerk.testing import assert_same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
cases = pytest.importorskip("peft_cases")
hotswap = pytest.importorskip("peft.utils.hotswap")

X = cases.X
layers = cases.layers


def compare(ours: Any, stock: Any, x: torch.Tensor = X, **kwargs: Any) -> None:
    a, b = cases.run(ours, x, **kwargs), cases.run(stock, x, **kwargs)
    cases.assert_like_peft(a, b, cases.in_double(stock), x, **kwargs)


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("base", cases.BASES)
def test_fuse_changes_classes_only_and_unfuse_changes_them_back(base: str, method: str) -> None:
    model = cases.make(base, method)
    before = dict(model.named_parameters())
    buffers, text = dict(model.named_buffers()), repr(model)
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(layer)) for layer in layers(model)]
    assert fuse(model) == ["base_model.model.up", "base_model.model.down"]
    assert fuse(model) == []
    assert all(p is before[name] for name, p in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert repr(model) == text
    for kind, module in zip(kinds, model.modules(), strict=True):
        assert isinstance(module, kind)
        assert (type(module) is kind) == (kind not in (peft.tuners.lora.Linear,)) or base == "bnb"
    cases.run(model, X)
    assert len(unfuse(model)) == 2
    assert unfuse(model) == []
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(layer)) for layer in layers(model)] == attributes


@pytest.mark.parametrize("base", cases.BASES)
def test_new_adapters_are_created_fused(base: str) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(cases.make_base(base), fused_config(cases.config_of("dora")))
    torch.manual_seed(3)
    stock = peft.get_peft_model(cases.make_base(base), cases.config_of("dora"))
    assert fuse(model) == []
    assert [row.path for row in explain(model).rows] == ["fused", "fused", "dense"]
    assert [layer.fused_name for layer in layers(model)] == ["up", "down"]
    for (name, a), (other, b) in zip(
        model.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert name == other
        assert_same_bits(a, b, name)
    compare(model, stock)


def test_the_dispatcher_leaves_alone_what_is_not_a_plain_linear() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(6, 64)
            self.table = nn.Embedding(5, 64)
            self.conv = nn.Conv2d(1, 2, 3)
            self.own = type("OwnLinear", (nn.Linear,), {})(64, 6)
            self.linear = nn.Linear(64, 6)

    names = ["conv1d", "table", "conv", "own", "linear"]
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(Model(), fused_config(peft.LoraConfig(target_modules=names)))
    kinds = {name: type(getattr(model.base_model.model, name)) for name in names}
    lora = peft.tuners.lora
    assert kinds == {
        "conv1d": lora.Linear, "table": lora.Embedding, "conv": lora.Conv2d, "own": lora.Linear,
        "linear": FusedLinear,
    }  # fmt: skip
    inner = model.base_model.model
    assert inner.conv1d.fan_in_fan_out
    assert not inner.linear.fan_in_fan_out
    assert fuse(model) == ["base_model.model.conv1d", "base_model.model.own"]
    rows = {row.name.rpartition(".")[2]: row for row in explain(model).rows}
    assert rows["conv1d"].why == "the base layer is a Conv1D"
    assert rows["own"].why == "the base layer is a OwnLinear"
    assert rows["table"].why == "lora.Embedding has no fused form"
    expected = inner.conv1d.base_layer(X) + 0  # lora_B is zero
    assert_same_bits(inner.conv1d(X), expected)


def test_target_parameters_are_left_to_peft() -> None:
    config = fused_config(peft.LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"]))
    model = peft.get_peft_model(cases.make_base("dense"), config)
    assert type(model.base_model.model.up) is peft.tuners.lora.layer.ParamWrapper
    assert fuse(model) == []


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("base", cases.BASES)
def test_adapter_files_interchange(tmp_path: Path, base: str, method: str) -> None:
    stock = cases.make(base, method, modules_to_save=["head"])
    ours = cases.fused(stock)
    for name, model in (("stock", stock), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    a, b = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("stock", "ours")
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("stock", "ours")]
    assert configs[0] == configs[1]

    with torch.no_grad():
        y = ours.eval()(X)
        config = fused_config(peft.LoraConfig.from_pretrained(tmp_path / "stock"))
        loaded = peft.PeftModel.from_pretrained(
            cases.make_base(base), tmp_path / "stock", config=config
        )
        assert fuse(loaded) == []
        assert_same_bits(loaded.eval()(X), y)
        plain = peft.PeftModel.from_pretrained(cases.make_base(base), tmp_path / "ours")
        assert_same_bits(plain.eval()(X), stock.eval()(X))
        plain = peft.PeftModel.from_pretrained(cases.make_base(base), tmp_path / "stock")
        plain.load_adapter(tmp_path / "ours", adapter_name="again")
        fuse(plain)
        plain.set_adapter("again")
        assert_same_bits(plain.eval()(X), y)


@pytest.mark.parametrize("second", cases.METHODS)
@pytest.mark.parametrize("base", cases.BASES)
def test_switching_disabling_deleting(base: str, second: str) -> None:
    stock = cases.two_adapters(base, second)
    ours = cases.fused(stock)
    for name in ("other", "default"):
        ours.set_adapter(name)
        stock.set_adapter(name)
        compare(ours, stock)
    double = cases.in_double(stock)  # bitsandbytes' own kernel is coarser than either
    with ours.disable_adapter(), double.disable_adapter():
        cases.assert_output_near(ours(X).detach(), double, X)
        assert [row.why for row in explain(ours).rows[:2]] == ["adapters are disabled"] * 2
    ours.delete_adapter("default")
    stock.delete_adapter("default")
    compare(ours, stock)


def test_adapters_that_differ_in_their_layers() -> None:
    model = cases.fused(cases.make("nf4"))
    model.add_adapter("up only", cases.config_of("dora", target_modules=["up"]))
    model.add_adapter("head too", cases.config_of(target_modules=["head"]))
    assert type(model.base_model.model.head) is peft.tuners.lora.Linear
    assert fuse(model) == ["base_model.model.head"]
    model.set_adapter("up only")
    paths = [(row.path, row.op) for row in explain(model).rows]
    assert paths == [("fused", "dora_linear"), ("fused", "nf4_linear"), ("dense", "")]
    cases.randomize(model, seed=9)
    stock = copy.deepcopy(model)
    unfuse(stock)
    compare(model, stock)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_weighted_combinations(kind: str) -> None:
    results = []
    for fuse_it in (False, True):
        model = cases.make("nf4")
        model.add_adapter("other", cases.config_of())
        cases.randomize(model, seed=4)
        if fuse_it:
            fuse(model)
        torch.manual_seed(1)
        density = 0.6 if kind in ("ties", "dare_linear") else None
        model.base_model.add_weighted_adapter(
            ["default", "other"], [0.7, -0.4], "mix", combination_type=kind, density=density
        )
        model.set_adapter("mix")
        results.append(model)
    stock, ours = results
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert_same_bits(a, b, name)
    compare(ours, stock)


NAMES = ["other", "__base__", "default", "other"]


@pytest.mark.parametrize("second", cases.METHODS)
@pytest.mark.parametrize("base", cases.BASES)
def test_mixed_batches_are_each_adapter_alone(base: str, second: str) -> None:
    stock = cases.two_adapters(base, second, lora_bias=second == "lora" and base != "bnb")
    ours = cases.fused(stock).eval()
    double = cases.in_double(stock).eval()  # bitsandbytes' own kernel is coarser than either
    for x in (X, X.view(4, 1, 64).repeat(1, 3, 1)):
        with torch.no_grad():
            mixed = ours(x, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            double.base_model.enable_adapter_layers()
            if name == "__base__":
                double.base_model.disable_adapter_layers()
            else:
                double.set_adapter(name)
            cases.assert_output_near(mixed[i : i + 1], double, x[i : i + 1])
    if second == "dora":
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            stock.eval()(X, adapter_names=NAMES)


def gradients(layer: Any, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The gradients of every adapter's parameters, active or not."""
    for name, p in layer.named_parameters():
        p.requires_grad_("lora_" in name)
        p.grad = None
    layer(x, **kwargs).square().sum().backward()
    return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def one_by_one(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same gradients of a batch whose rows have the adapters NAMES, a row at a time."""
    total: dict[str, Any] = {}
    for i, name in enumerate(NAMES):
        if name != "__base__":
            layer.set_adapter(name)
            for key, grad in gradients(layer, x[i : i + 1]).items():
                total[key] = total.get(key, 0) + grad
    return total


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gradients_of_a_mixed_batch(base: str) -> None:
    stock = cases.two_adapters(base, "dora").eval()
    mixed = gradients(cases.fused(stock).base_model.model.up, X, adapter_names=NAMES)
    theirs = one_by_one(stock.base_model.model.up, X)
    truth = one_by_one(cases.in_double(stock).base_model.model.up, X.double())
    assert mixed.keys() == truth.keys()
    assert sum("lora_magnitude" in key for key in mixed) == 1
    for key, value in truth.items():
        size = float(value.abs().max())
        budget = 2 * float((theirs[key] - value).abs().max()) + size * 2.0**-24 * 4 * 128**0.5
        assert float((mixed[key] - value).abs().max()) <= budget, key


def test_pefts_checks_of_a_mixed_batch_stay() -> None:
    model = cases.fused(cases.two_adapters("dense", "dora")).eval()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(X, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(X, adapter_names=["default", "unknown", "other", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(X, adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(X, adapter_names=NAMES)


def test_pefts_helpers() -> None:
    helpers = pytest.importorskip("peft.helpers")
    stock = cases.make("nf4", "dora")
    ours = cases.fused(stock)
    with helpers.rescale_adapter_scale(ours, 0.3), helpers.rescale_adapter_scale(stock, 0.3):
        compare(ours, stock)
    with helpers.disable_input_dtype_casting(ours), helpers.disable_input_dtype_casting(stock):
        compare(ours, stock)


def test_pickling_keeps_no_norms() -> None:
    model = cases.fused(cases.make("nf4", "dora")).eval()
    with torch.no_grad():
        y = model(X)
        again = pickle.loads(pickle.dumps(model))
        assert all(layer.norms._base is None for layer in layers(again))
        assert_same_bits(again(X), y)


def test_loading_with_low_memory(tmp_path: Path) -> None:
    model = cases.fused(cases.make("nf4", "dora")).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        cases.make_base("nf4"), tmp_path, low_cpu_mem_usage=True,
        config=fused_config(peft.LoraConfig.from_pretrained(tmp_path)),
    )  # fmt: skip
    assert [row.path for row in explain(loaded).rows] == ["fused", "fused", "dense"]
    with torch.no_grad():
        assert_same_bits(loaded.eval()(X), model(X))


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_an_adapter_for_each_prompt(beams: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    quantize_model(base)
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, fused_config(peft.LoraConfig(r=4, use_dora=True, **targets)))
    model.add_adapter("other", fused_config(peft.LoraConfig(r=2, **targets)))
    cases.randomize(model)
    model.eval()
    tokens = torch.arange(12).view(4, 3)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=tokens, adapter_names=NAMES, **options)
    for i, name in enumerate(NAMES):
        row = tokens[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=row, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=row, **options)
        assert torch.equal(mixed[i], alone[0])
    assert len({tuple(row[3:].tolist()) for row in mixed}) > 1
