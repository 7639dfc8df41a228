"""Architectures: presets against published sizes and transformers' own modules, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from feinwerk import plan
from feinwerk.plan import presets
from feinwerk.plan.architecture import architecture, from_config
from feinwerk.plan.resident import dense_tensors

transformers = pytest.importorskip("transformers")

# As the models' own safetensors files count them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}
CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_every_preset_has_its_published_size() -> None:
    assert set(PUBLISHED) == set(presets.PRESETS)
    assert {name: architecture(name).parameters for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "phi-3-mini"])
def test_a_preset_has_the_tensors_of_transformers_model(name: str) -> None:
    values = dict(presets.find(name) or {})
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(tensor.shape for tensor in dense_tensors(architecture(name))) == shapes


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_a_model_its_config_and_its_file_are_one(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    found = [architecture(model), architecture(config), architecture(tmp_path)]
    found += [architecture(str(tmp_path / "config.json")), architecture(config.to_dict())]
    assert all(one == found[0] for one in found)
    assert found[0].parameters == sum(p.numel() for p in model.parameters())
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(tensor.shape for tensor in dense_tensors(found[0])) == shapes


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("meta-llama/Llama-3.1-8B", "llama-3-8b"),
    ],
)
def test_names_of_the_hub_are_known(name: str, preset: str) -> None:
    assert architecture(name) == architecture(preset)


def test_biases_of_llama_are_counted() -> None:
    plain = from_config(CONFIG)
    biased = from_config({**CONFIG, "attention_bias": True, "mlp_bias": True})
    # q, k, v, o and down have 64 rows, gate and up 128.
    assert biased.parameters - plain.parameters == 2 * (5 * 64 + 2 * 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, .*got 'gpt2'"),
        ({"model_type": None}, "model_type must be one of"),
        ({"hidden_size": None}, "hidden_size must be a whole number of at least 1, got no such"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number .*got '2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number .*got True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 64"),
    ],
)
def test_a_config_that_cannot_be_planned(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan: {message}"):
        plan({**CONFIG, **change})


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be the path of a config.json or one of smol"):
        plan("no-such-model")
    with pytest.raises(TypeError, match=r"model must be the name of a preset, .*got int"):
        plan(7)
    file = tmp_path / "config.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="model must be a readable JSON file"):
        plan(tmp_path)
    file.write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model must be a JSON object, got .* with a list"):
        plan(file)
