"""Exported causal LMs: logits of prompts and of every later token against torch, in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_budget import truth_and_budget
from tiny_lms import (
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    VOCABULARY,
    dense_form,
    empty_cache,
    ragged_batch,
    run_in_steps,
    session_of,
    tiny_lm,
)
from torch import nn

from feinwerk.onnx import export_causal_lm

pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


class Folder:
    """Models and their files, each exported when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[tuple[str, str], Any] = {}

    def model(self, kind: str, method: str) -> Any:
        if (kind, method) not in self.models:
            self.models[kind, method] = tiny_lm(kind, method)
        return self.models[kind, method]

    def file(self, kind: str, method: str, ops: str) -> Path:
        path = self.path / f"{kind}-{method}-{ops}.onnx"
        if not path.exists():
            export_causal_lm(self.model(kind, method), path, ops=ops)
        return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("lms"))


def worst_of_budget(logits: np.ndarray, model: Any, texts: tuple[torch.Tensor, ...]) -> float:
    """Return the largest error of real tokens' logits as a share of the budget."""
    wide = dense_form(model, torch.float64)
    with torch.no_grad():
        peer = dense_form(model, torch.float32)(*texts).logits
        real = texts[1] != 0
        peer[~real] = wide(*texts).logits[~real].float()  # what padding says is no one's business
        truth, budget = truth_and_budget(peer, wide, wide.lm_head, *texts)
    return float(((torch.from_numpy(logits) - truth).abs() / budget)[real].max())


@pytest.mark.parametrize(
    ("kind", "method", "ops", "library"),
    [
        ("dense", "none", "feinwerk", True),
        ("nf4", "lora", "feinwerk", True),
        ("nf4", "lora", "feinwerk", False),
        ("nf4", "lora", "contrib", False),
        ("nf4", "lora", "portable", False),
        ("nf4", "dora", "feinwerk", True),
    ],
)
def test_logits_of_prompts_and_of_every_later_token(folder, kind, method, ops, library):
    texts = ragged_batch()
    session = session_of(folder.file(kind, method, ops), library)
    logits = run_in_steps(session, *texts)
    assert worst_of_budget(logits, folder.model(kind, method), texts) <= 1


def test_the_budget_sees_a_mask_that_is_ignored(folder):
    ids, mask, positions = ragged_batch()
    session = session_of(folder.file("nf4", "lora", "feinwerk"))
    logits = run_in_steps(session, ids, torch.ones_like(mask), positions)
    assert worst_of_budget(logits, folder.model("nf4", "lora"), (ids, mask, positions)) > 100


def test_later_tokens_do_not_change_the_logits_of_earlier_ones(folder):
    ids, mask, positions = ragged_batch()
    session = session_of(folder.file("nf4", "lora", "feinwerk"))
    changed = ids.clone()
    changed[:, max(LENGTHS) - 1] = (ids[:, max(LENGTHS) - 1] + 1) % VOCABULARY
    first, second = (run_in_steps(session, t, mask, positions) for t in (ids, changed))
    earlier = mask.numpy() != 0
    earlier[:, max(LENGTHS) - 1 :] = False
    np.testing.assert_array_equal(first[earlier], second[earlier])
    assert (first[:, max(LENGTHS) - 1 :] != second[:, max(LENGTHS) - 1 :]).any()


def test_a_portable_file_runs_in_the_reference_of_onnx(folder):
    texts = ragged_batch()
    path = folder.file("nf4", "lora", "portable")
    domains = {entry.domain for entry in onnx.load(path).opset_import}
    assert not {"feinwerk", "com.microsoft"} & domains
    logits = run_in_steps(ReferenceEvaluator(str(path)), *texts)
    assert worst_of_budget(logits, folder.model("nf4", "lora"), texts) <= 1


def test_names_shapes_and_metadata(folder):
    session = session_of(folder.file("nf4", "lora", "feinwerk"))
    inputs = {value.name: value for value in session.get_inputs()}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert list(inputs)[3:] == list(empty_cache(1))
    assert inputs["past_key_values.1.value"].shape == [
        "batch_size", KV_HEADS, "past_sequence_length", HEAD_SIZE,
    ]  # fmt: skip
    outputs = [value.name for value in session.get_outputs()]
    assert outputs == [
        "logits",
        *(name.replace("past_key_values", "present") for name in inputs if "past" in name),
    ]
    facts = session.get_modelmeta().custom_metadata_map["feinwerk.causal_lm"]
    assert f'"layers": {LAYERS}' in facts
    assert '"eos_token_id": [2]' in facts
    adapters = {value.name for value in session.get_overridable_initializers()}
    assert "model.layers.1.mlp.down_proj.lora_A" in adapters


def test_the_last_logits_alone_from_a_model_that_is_left_in_training_mode(folder, tmp_path):
    texts = ragged_batch()
    path = tmp_path / "last.onnx"
    model = folder.model("nf4", "lora").train()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    export_causal_lm(model, path, last_logits_only=True)
    assert modes == {name: module.training for name, module in model.named_modules()}
    after = model.eval().state_dict()
    assert kept.keys() == after.keys()
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    logits = run_in_steps(session_of(path), *texts)
    whole = run_in_steps(session_of(folder.file("nf4", "lora", "feinwerk")), *texts)
    assert logits.shape[1] == 1 + 3
    # The head's product has other sizes, so that its sums may be in another order.
    last = whole[:, max(LENGTHS) - 1 :]
    padded = np.concatenate([whole[:, : max(LENGTHS) - 1], logits], axis=1)
    assert worst_of_budget(padded, folder.model("nf4", "lora"), texts) <= 1
    assert (logits.argmax(-1) == last.argmax(-1)).all()


def test_rejections(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(TypeError, match="model must be a causal LM of type llama, mistral, qwen2"):
        export_causal_lm(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match=r"must be torch.float32 .*, got torch.bfloat16"):
        export_causal_lm(tiny_lm("dense").bfloat16(), path)
    config = tiny_lm("dense").config.to_dict()
    config |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    grown = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with pytest.raises(
        ValueError, match=r"must have a rotary embedding of type default, .*dynamic"
    ):
        export_causal_lm(grown, path)
    windowed = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=16, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="must have no sliding window, got 4"):
        export_causal_lm(transformers.MistralForCausalLM(windowed).eval(), path)
    assert not path.exists()


@pytest.mark.parametrize("kind", [pytest.param("mistral", marks=pytest.mark.full), "qwen2"])
def test_relatives_of_llama(kind, tmp_path):
    """Mistral without its window, and Qwen2 with its biases."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64, "initializer_range": 0.3, "sliding_window": None,
    }  # fmt: skip
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    export_causal_lm(model, tmp_path / "model.onnx", eos_token_id=[5, 6])
    texts = ragged_batch()
    session = session_of(tmp_path / "model.onnx")
    assert worst_of_budget(run_in_steps(session, *texts), model, texts) <= 1
    facts = session.get_modelmeta().custom_metadata_map["feinwerk.causal_lm"]
    assert '"eos_token_id": [5, 6]' in facts
