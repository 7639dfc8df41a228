"""A tiny random Llama with grouped heads, dense or NF4 with PEFT's adapters, and its fp64 truth."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnxruntime
import torch

import feinwerk
import feinwerk.onnx

LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY = 2, 2, 16, 211
# Prompts of different lengths, padded on the left, and the tokens that follow them.
LENGTHS, FOLLOWING = (5, 9, 1), 3


def tiny_lm(kind: str, method: str = "lora", seed: int = 0) -> Any:
    """Return a model in eval mode: "dense", or "nf4" with PEFT's adapters, fused."""
    import peft
    import transformers

    from feinwerk.integrations.peft import fuse

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    if kind == "nf4":
        feinwerk.quantize_model(model)
        names = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        options = peft.LoraConfig(r=4, target_modules=names, use_dora=method == "dora")
        model = peft.get_peft_model(model, options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        fuse(model)
    return model.eval()


def dense_form(model: Any, dtype: torch.dtype) -> Any:
    """Return a dense copy with the adapter merged in, by stock PEFT in that dtype."""
    from feinwerk.integrations.peft import unfuse

    copied = copy.deepcopy(model)
    if hasattr(copied, "merge_and_unload"):
        unfuse(copied)
        feinwerk.dequantize_model(copied)
        return copied.to(dtype).merge_and_unload().eval()
    return copied.to(dtype).eval()


def ragged_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and positions [3, longest + FOLLOWING]: whole texts."""
    generator = torch.Generator().manual_seed(7)
    width = max(LENGTHS) + FOLLOWING
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
    return ids, mask, (mask.cumsum(dim=1) - 1).clamp_min(0)


def session_of(path: Any, library: bool = True) -> onnxruntime.InferenceSession:
    """Return a session of one thread, with the custom-op library or without."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        feinwerk.onnx.register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def empty_cache(batch: int) -> dict[str, np.ndarray]:
    """Return the cache before the first token."""
    shape = (batch, KV_HEADS, 0, HEAD_SIZE)
    return {
        f"past_key_values.{layer}.{part}": np.zeros(shape, np.float32)
        for layer in range(LAYERS)
        for part in ("key", "value")
    }


def run_in_steps(session: Any, *texts: torch.Tensor) -> np.ndarray:
    """Feed the prompts at once and what follows token by token; logits of every position."""
    ids, mask, positions = (tensor.numpy() for tensor in texts)
    cache = empty_cache(len(ids))
    rows, at = [], 0
    while at < ids.shape[1]:
        end = max(LENGTHS) if at == 0 else at + 1
        logits, *present = session.run(
            None,
            {
                "input_ids": ids[:, at:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, at:end],
                **cache,
            },
        )
        cache = dict(zip(cache, present, strict=True))
        rows.append(logits)
        at = end
    return np.concatenate(rows, axis=1)
