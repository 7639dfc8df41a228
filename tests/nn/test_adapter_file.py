"""PEFT's adapter files: PEFT reads ours, we read PEFT's, with the same outputs; what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_adapters_in_model import EVERYTHING, TOKENS, Model, make_model, state, train
from torch import nn

from feinwerk import quantize_model
from feinwerk.nn import (
    LoRALinear,
    adapters_of,
    add_adapters,
    dequantize_model,
    load_adapter,
    save_adapter,
)
from feinwerk.testing import assert_same_bits, ulp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class WithConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = transformers.pytorch_utils.Conv1D(24, 16)
        self.second = nn.Linear(24, 16)
        self.embed = nn.Embedding(20, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(tokens)))


def make_conv1d() -> WithConv1D:
    torch.manual_seed(0)
    return WithConv1D()


def assert_same_result(ours: nn.Module, theirs: nn.Module) -> None:
    """|ours - theirs64| <= 2 max|theirs - theirs64| + one rounding."""
    y, peer = ours.eval()(TOKENS), theirs.eval()(TOKENS)
    truth = copy.deepcopy(theirs).double()(TOKENS)
    off = 2 * (peer - truth).abs().max() + ulp(truth, torch.float32).max()
    assert (y - truth).abs().max() <= off


def assert_same_weights(model: nn.Module, theirs: Any) -> None:
    """The weights that the layers stand for, W + s B A with DoRA's gain, in fp64.

    W itself may have been rounded after other subtractions of s B A: once in each, and in the
    K + r products of the norm.
    """
    theirs = copy.deepcopy(theirs).double()
    theirs.merge_adapter()
    for name, layer in adapters_of(model).items():
        truth = theirs.get_submodule(f"base_model.model.{name}.base_layer").weight
        sizes = layer.weight.abs() + layer.scaling * layer.lora_B.abs() @ layer.lora_A.abs()
        if hasattr(layer, "magnitude"):
            sizes = sizes * layer._gain()[:, None]
        depth = layer.lora_A.shape[1] + 2 * layer.r
        bound = 8 * depth**0.5 * 2.0**-24 * sizes.max()
        assert (layer.merged_weight() - truth).abs().max() <= bound


def their_model(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "dora": {"dora": True},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["up", "down", "conv"]},
    "orthogonal": {"init": "orthogonal", "target_modules": None},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*no bias.*")
def test_peft_reads_ours_and_writes_it_back(kind: str, tmp_path: Path) -> None:
    model = make_model()
    options = {"target_modules": EVERYTHING, **OPTIONS[kind]}
    names = add_adapters(model, 4, lora_alpha=6, **options)
    train(model)
    save_adapter(model, tmp_path / "ours")
    theirs = their_model(make_model(), tmp_path / "ours")
    assert_same_result(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / who / "adapter_model.safetensors" for who in ("ours", "theirs")]
    ours, back = (safetensors.torch.load_file(file) for file in files)
    assert ours.keys() == back.keys()
    for key, value in ours.items():
        assert_same_bits(back[key], value, key)
    again = make_model()
    assert sorted(load_adapter(again, tmp_path / "theirs")) == sorted(names)
    for name, layer in adapters_of(again).items():
        source = adapters_of(model)[name]
        assert type(layer) is type(source)
        assert layer.scaling == source.scaling
        assert layer.dropout == source.dropout
    assert_same_bits(again.eval()(TOKENS), model(TOKENS))
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert all(name.rsplit(".", 1)[-1].startswith(("lora_", "magnitude")) for name in trained)


@pytest.mark.parametrize("dora", [False, True])
def test_we_read_what_peft_trained(dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=dora, target_modules=["up", "down", "embed", "lm_head"],
        rank_pattern={"layers.1.up": 2, "^embed": 3}, alpha_pattern={"down": 3.5},
        lora_dropout=0.05,
    )  # fmt: skip
    theirs = peft.get_peft_model(make_model(), config)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    for quantized in (False, True):
        model = make_model(quantized)
        load_adapter(model, tmp_path)
        ranks = {name: (layer.r, layer.lora_alpha) for name, layer in adapters_of(model).items()}
        assert ranks["layers.1.up"] == (2, 6)
        assert ranks["layers.0.down"] == (4, 3.5)
        assert ranks["embed"] == (3, 6)
        if quantized:  # the same adapter over the 4-bit base, as PEFT has it over its values
            base = make_model(quantized=True)
            dequantize_model(base)
            assert_same_result(model, their_model(base, tmp_path))
        else:
            assert_same_result(model, theirs)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_both_ways(dora: bool, tmp_path: Path) -> None:
    model = make_conv1d()
    add_adapters(model, 4, lora_alpha=6, dora=dora, target_modules=["first", "second"])
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path)
    theirs = their_model(make_conv1d(), tmp_path)
    assert_same_result(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make_conv1d()
    load_adapter(again, tmp_path / "theirs")
    assert_same_bits(again.eval()(TOKENS), model(TOKENS))


def test_a_transformers_model_with_an_adapted_embedding(tmp_path: Path) -> None:
    def llama() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(llama(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1  # the file has the table: it is put back
    assert load_adapter(model, tmp_path) == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
    ]
    logits, peer = model(TOKENS).logits, theirs(TOKENS).logits
    truth = theirs.double()(TOKENS).logits
    off = 2 * (peer - truth).abs().max() + ulp(truth, torch.float32).max()
    assert (logits - truth).abs().max() <= off
    model = llama()
    quantize_model(model, embeddings=True)
    with pytest.raises(ValueError, match=r"base_layer\.weight must be absent from the file for an"):
        load_adapter(model, tmp_path)


class TestInitsThatChangeTheBase:
    @pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
    @pytest.mark.parametrize("dora", [False, True])
    def test_the_file_is_for_the_original_base(self, init: str, dora: bool, tmp_path: Path) -> None:
        model = make_model()
        add_adapters(model, 4, lora_alpha=6, init=init, dora=dora)
        train(model)
        save_adapter(model, tmp_path)
        theirs = their_model(make_model(), tmp_path)
        assert_same_weights(model, theirs)
        again = make_model()
        load_adapter(again, tmp_path)
        assert all(layer.r == 8 for layer in adapters_of(again).values())
        assert_same_result(again, theirs)

    @pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
    def test_the_current_base(self, init: str, tmp_path: Path) -> None:
        model = make_model(quantized=init == "pissa")
        add_adapters(model, 4, lora_alpha=6, init=init)
        train(model)
        if init != "olora":
            with pytest.raises(ValueError, match=r"save_adapter: layers\.0\.up must have a dense"):
                save_adapter(model, tmp_path / "none")
            assert not (tmp_path / "none").exists()
        save_adapter(model, tmp_path, relative_to="current")
        torch.save(model.state_dict(), tmp_path / "base")
        again = make_model(quantized=init == "pissa")
        add_adapters(again, 4, lora_alpha=6, init=init)
        again.load_state_dict(torch.load(tmp_path / "base"))
        load_adapter(again, tmp_path)
        assert_same_bits(again(TOKENS), model(TOKENS))

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_peft_repeats_the_init_and_so_do_we(self, init: str, tmp_path: Path) -> None:
        config = peft.LoraConfig(
            r=4, lora_alpha=6, init_lora_weights=init, target_modules=["up", "down"]
        )
        theirs = peft.get_peft_model(make_model(), config)
        train(theirs)
        theirs.save_pretrained(tmp_path)
        model = make_model()
        load_adapter(model, tmp_path)
        assert all(layer.init == init for layer in adapters_of(model).values())
        assert_same_weights(model, theirs)
        other = make_model()
        add_adapters(other, 4, lora_alpha=6)
        with pytest.raises(ValueError, match=f"must have init='{init}' as in the file"):
            load_adapter(other, tmp_path)


def test_names_that_are_the_end_of_others(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 32), nn.Sequential(
            nn.Identity(), nn.Linear(32, 32)))  # fmt: skip

    model = nested()
    assert add_adapters(model, 4, lora_alpha=6, target_modules=["1"]) == ["1", "2.1"]
    model[2][1] = model[2][1].release()
    nn.init.normal_(model[1].lora_B)
    save_adapter(model, tmp_path)
    theirs = their_model(nested(), tmp_path)
    assert_same_result(model, theirs)
    again = nested()
    assert load_adapter(again, tmp_path) == ["1"]


class TestRejections:
    def saved(self, folder: Path, **options: Any) -> tuple[Model, dict[str, Any]]:
        model = make_model()
        add_adapters(model, 4, lora_alpha=6, target_modules=["up"], **options)
        save_adapter(model, folder)
        return model, json.loads((folder / "adapter_config.json").read_text())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
            ({"bias": "all"}, "bias must be 'none': it cannot be honoured here, got 'all'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save must be None"),
            ({"use_qalora": True}, "use_qalora must be False"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens must be None"),
            ({"layer_replication": [[0, 1]]}, "layer_replication must be None"),
            ({"init_lora_weights": "lora_ga"}, "init_lora_weights must be one that leaves"),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be one that leaves"),
            ({"use_dora": True}, r"layers\.0\.up must have its magnitude in the file"),
            ({"r": 5}, r"layers\.0\.up\.lora_A must have shape \(5, 32\), got \(4, 32\)"),
        ],
    )
    def test_configs(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        _, config = self.saved(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        model = make_model()
        before = state(model)
        with pytest.raises(ValueError, match=f"load_adapter: {message}"):
            load_adapter(model, tmp_path)
        assert adapters_of(model) == {}
        for key, value in model.state_dict().items():
            assert_same_bits(value, before[key], key)

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("layers.0.up.lora_A.weight", (4, 31), r"layers\.0\.up\.lora_A must have shape"),
            ("layers.1.up.lora_B.weight", (63, 4), r"layers\.1\.up\.lora_B must have shape"),
            ("layers.7.up.lora_A.weight", (4, 32), r"layers\.7\.up must have its lora_B in the"),
            ("norm.weight", (32,), r"key must be one that PEFT writes for LoRA or DoRA, got"),
        ],
    )
    def test_tensors(self, key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
        trained, _ = self.saved(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        tensors[f"base_model.model.{key}"] = torch.zeros(shape)
        safetensors.torch.save_file(tensors, file)
        for model in (make_model(), trained):
            before = state(model)
            with pytest.raises(ValueError, match=f"load_adapter: {message}"):
                load_adapter(model, tmp_path)
            assert state(model).keys() == before.keys()
            for name, value in model.state_dict().items():
                assert_same_bits(value, before[name], name)

    def test_models(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        with pytest.raises(ValueError, match=r"key must name a layer .*, got 'layers\.0\.up'"):
            load_adapter(make_conv1d(), tmp_path)
        model = make_model()
        add_adapters(model, 3, lora_alpha=6, target_modules=["up"])
        with pytest.raises(ValueError, match=r"layers\.0\.up must have r=4 and lora_bias=False"):
            load_adapter(model, tmp_path)
        model = make_model()
        add_adapters(model, 4, lora_alpha=6, target_modules=["up"], dora=True)
        with pytest.raises(ValueError, match=r"layers\.0\.up must be LoRA as in the file"):
            load_adapter(model, tmp_path)
        with pytest.raises(ValueError, match="save_adapter: model must contain adapters"):
            save_adapter(make_model(), tmp_path / "none")
        add_adapters(model, 4, lora_alpha=6, target_modules=["down"])
        with pytest.raises(ValueError, match="adapters must be alike in DoRA, use_rslora"):
            save_adapter(model, tmp_path / "none")
        merged, _ = self.saved(tmp_path)
        adapters_of(merged)["layers.1.up"].merge()
        with pytest.raises(ValueError, match=r"save_adapter: layers\.1\.up must be unmerged"):
            save_adapter(merged, tmp_path / "none")
        with pytest.raises(ValueError, match=r"load_adapter: layers\.1\.up must be unmerged"):
            load_adapter(merged, tmp_path)
        with pytest.raises(ValueError, match='relative_to must be "original" or "current"'):
            save_adapter(merged, tmp_path / "none", relative_to="base")
        assert not (tmp_path / "none").exists()
        assert isinstance(adapters_of(merged)["layers.0.up"], LoRALinear)
