"""transformers models: generate, GPT-2's Conv1D, checkpoints that bitsandbytes' loader reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk import quantize_model
from feinwerk.nn import NF4Embedding, NF4Linear, dequantize_model
from feinwerk.testing import assert_same_bits

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(24).view(2, 12) % 31


def make_llama(**kwargs: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_llama_runs_like_its_dequantized_self() -> None:
    model = make_llama()
    report = quantize_model(model)
    assert len(report.layers) == 14
    assert set(report.skipped) == {"model.embed_tokens", "lm_head"}
    with torch.no_grad():
        logits = model(TOKENS).logits
        tokens = model.generate(
            TOKENS[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert tokens.shape == (1, 9)
        assert_same_bits(
            model.generate(
                TOKENS[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0,
                eos_token_id=None, use_cache=False,
            ),
            tokens,
        )  # fmt: skip
        dequantize_model(model)
        assert torch.allclose(model(TOKENS).logits, logits, atol=1e-4)


def test_whole_model_casts() -> None:
    model = make_llama()
    quantize_model(model)
    layer = model.model.layers[0].mlp.up_proj
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(TOKENS).logits.dtype == torch.bfloat16
    for key, value in layer.state_dict().items():
        if "quant_state" not in key:
            assert_same_bits(value, before[key], key)


def test_tied_head_and_embedding() -> None:
    model = make_llama(tie_word_embeddings=True)
    report = quantize_model(model, skip=())
    assert report.skipped["lm_head"] == "tied to model.embed_tokens, which stays dense"
    model = make_llama(tie_word_embeddings=True)
    quantize_model(model, skip=(), embeddings=True)
    assert isinstance(model.lm_head, NF4Linear)
    assert isinstance(model.model.embed_tokens, NF4Embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(TOKENS).logits.isfinite().all()


def test_gpt2_keeps_its_conv1d_and_says_so() -> None:
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    report = quantize_model(model)
    assert not report.layers
    conv = {name: why for name, why in report.skipped.items() if why.startswith("Conv1D")}
    assert set(conv) == {
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_compile_a_whole_model_without_graph_break() -> None:
    model = make_llama(use_cache=False)
    quantize_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.allclose(compiled(TOKENS).logits, expected, atol=1e-5)


def test_their_loader_reads_our_checkpoint_and_we_read_theirs(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model = make_llama()
    quantize_model(model)
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", device_map="cpu", local_files_only=True
    )
    layer = theirs.model.layers[1].mlp.down_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    ours = model.state_dict()
    for key, value in theirs.state_dict().items():
        assert_same_bits(ours[key], value, key)

    again = make_llama()
    torch.nn.init.ones_(again.model.layers[0].mlp.up_proj.weight)
    quantize_model(again)
    again.load_state_dict(theirs.state_dict())
    assert_same_bits(again(TOKENS).logits.detach(), model(TOKENS).logits.detach())
