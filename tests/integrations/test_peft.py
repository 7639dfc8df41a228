"""Stock PEFT on NF4 models: attach, train, save, reload, DoRA, and no silent merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from feinwerk import quantize_model
from feinwerk.nn import NF4Embedding, NF4Linear, dequantize_model
from feinwerk.testing import assert_same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(48).view(4, 12) % 31


def make_base(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    quantize_model(model, **kwargs)
    return model


def attach(base: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **kwargs
    )
    return peft.get_peft_model(base, config)


def train(model: Any, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def codes(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return [t.detach().clone() for m in layers for t in (m.weight, m.absmax, m.nested_absmax)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attach_train_save_reload(tmp_path: Path, dtype: torch.dtype) -> None:
    model = attach(make_base(dtype))
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 14
    assert all(isinstance(m.base_layer, NF4Linear) for m in wrapped)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.dtype == torch.float32 for p in adapters)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    before = codes(model)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    for a, b in zip(before, codes(model), strict=True):
        assert_same_bits(a, b)

    model.eval()
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 28
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in saved)
    again = peft.PeftModel.from_pretrained(make_base(dtype), tmp_path).eval()
    with torch.no_grad():
        assert_same_bits(again(TOKENS).logits, model(TOKENS).logits)
        with again.disable_adapter():
            assert_same_bits(again(TOKENS).logits, make_base(dtype).eval()(TOKENS).logits)


def test_gradients_are_those_of_the_dequantized_model() -> None:
    model = attach(make_base())
    dense = attach(make_base())
    dequantize_model(dense)
    # lora_B starts at zero, and with it the gradient of lora_A.
    for m in (model, dense):
        generator = torch.Generator().manual_seed(2)
        for name, p in m.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
    grads = []
    for m in (model, dense.double()):
        m(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if "lora_" in name})
    for name, truth in grads[1].items():
        error = (grads[0][name] - truth).abs().max()
        assert error <= 1e-4 * truth.abs().max(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_kbit_preparation(reentrant: bool) -> None:
    base = peft.prepare_model_for_kbit_training(
        make_base(torch.bfloat16),
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert base.lm_head.weight.dtype == torch.bfloat16 or base.lm_head.weight.dtype == torch.float32
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model = attach(base)
    before = codes(model)
    losses = train(model.train(), steps=6)
    assert losses[-1] < losses[0]
    for a, b in zip(before, codes(model), strict=True):
        assert_same_bits(a, b)


def test_autocast_training_step() -> None:
    model = attach(make_base())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_an_error_and_changes_nothing(safe: bool) -> None:
    model = attach(make_base())
    train(model, steps=2)
    before = codes(model)
    with pytest.raises(RuntimeError, match=r"Byte|broadcast shape|size of tensor"):
        model.merge_adapter(safe_merge=safe)
    for a, b in zip(before, codes(model), strict=True):
        assert_same_bits(a, b)


def test_merging_after_dequantize_model() -> None:
    model = attach(make_base())
    train(model)
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert len(dequantize_model(model)) == 14
    merged = model.merge_and_unload()
    assert not any(isinstance(m, NF4Linear) for m in merged.modules())
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, expected, atol=1e-4)


def test_dora_takes_its_norms_from_the_dequantized_weight(tmp_path: Path) -> None:
    model = attach(make_base(), use_dora=True)
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for m in wrapped:
        norm = m.base_layer.dequantize().norm(dim=1)
        magnitude = m.lora_magnitude_vector["default"].weight
        assert torch.allclose(magnitude, norm, rtol=1e-5)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_base(), tmp_path).eval()
    with torch.no_grad():
        assert_same_bits(again(TOKENS).logits, model(TOKENS).logits)


def test_embedding_adapters() -> None:
    base = make_base(embeddings=True)
    assert isinstance(base.model.embed_tokens, NF4Embedding)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    )
    assert isinstance(base.model.embed_tokens, peft.tuners.lora.Embedding)
    losses = train(model)
    assert losses[-1] < losses[0]
