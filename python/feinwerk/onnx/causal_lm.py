"""export_causal_lm: a Llama-family chat model with its KV cache as an ONNX file.

```
   input_ids      [batch, sequence]                  logits   [batch, sequence (or 1), vocab]
   attention_mask [batch, past + sequence]   --->    present.0.key, present.0.value, ...
   position_ids   [batch, sequence]                           [batch, kv heads, past + sequence, D]
   past_key_values.0.key, past_key_values.0.value, ...
                  [batch, kv heads, past, D]
```

The names are those that onnxruntime-genai expects. The sizes a generation loop needs are in the
file's metadata, so that `generate` needs nothing beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.onnx import decoder_blocks
from feinwerk.onnx.export_checks import unwrapped
from feinwerk.onnx.generation import METADATA_KEY

_OP = "export_causal_lm"
_FED = ("input_ids", "attention_mask", "position_ids")
# Decoders of one form: RMSNorm, rotary attention with grouped heads, gated MLP, two residuals.
MODEL_TYPES = ("llama", "mistral", "qwen2")
# Their angles follow from positions alone, not from how long the text has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class _Decoder(nn.Module):
    """The model as a function of ids, mask, positions and cache; submodules keep their names."""

    def __init__(self, causal: Any, last_logits_only: bool) -> None:
        super().__init__()
        self.model = causal.model
        self.lm_head = causal.lm_head
        self.last_logits_only = last_logits_only
        self.group = causal.config.num_attention_heads // _kv_heads(causal.config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        decoder: Any = self.model
        past_length = past_key_values[0].shape[2]
        hidden = decoder.embed_tokens(input_ids)
        rotation = _rotation(*decoder.rotary_emb(hidden, position_ids))
        bias = _attention_bias(attention_mask, input_ids.shape[1], past_length, hidden.dtype)
        bias = bias.repeat(1, 1, self.group, 1)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            x = decoder_blocks.rms_norm(hidden, layer.input_layernorm.weight)
            y, key, value = decoder_blocks.cached_attention(
                (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)),
                past_key_values[2 * index : 2 * index + 2],
                rotation,
                bias,
                past_length,
            )
            present += (key, value)
            hidden = hidden + attention.o_proj(y)
            x = decoder_blocks.rms_norm(hidden, layer.post_attention_layernorm.weight)
            hidden = hidden + layer.mlp(x)
        if self.last_logits_only:
            hidden = hidden[:, -1:]
        logits = self.lm_head(decoder_blocks.rms_norm(hidden, decoder.norm.weight))
        return (logits, *present)


def _rotation(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [B, S, 1, D], sin with the sign of the swapped halves."""
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return cos[:, :, None], signed[:, :, None]


def _attention_bias(
    mask: torch.Tensor, rows: int, past_length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return [B, 1, rows, total]: 0 where a row may look, the most negative number elsewhere."""
    at = torch.arange(rows)[:, None] + past_length
    causal = torch.arange(mask.shape[1])[None, :] <= at
    allowed = causal[None] & (mask[:, None, :] != 0)
    return torch.where(allowed, 0.0, torch.finfo(dtype).min)[:, None]


def export_causal_lm(
    model: nn.Module,
    path: str | Path,
    *,
    ops: str = "feinwerk",
    last_logits_only: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Write a causal LM with its KV cache as inputs and outputs.

    The weights are written as they are: NF4 codes stay codes, and adapters (PEFT's, or those of
    `feinwerk.nn`) become inputs with defaults, so that other adapters can take their place.

    Args:
        model: a transformers model of type llama, mistral or qwen2, or a PeftModel around one;
            fp32 but for its NF4 codes (`model.float()` leaves those as they are).
        path: of the .onnx file.
        ops: "feinwerk", "contrib" or "portable", as in `feinwerk.onnx.export`.
        last_logits_only: compute the logits of the last position alone: all that generation needs.
            A prompt of 200 tokens saves 199/200 of the head's work.
        eos_token_id: ends a text; default that of the model's generation config.
        options: passed on to `feinwerk.onnx.export`: adapters, external_data, ...

    Returns:
        The ExportReport of `feinwerk.onnx.export`.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
        TypeError: if the model is none of the named types or not fp32.
        ValueError: if it has a sliding window or a rotary embedding that depends on the length.

    Source:
        onnxruntime-genai 0.18, the names of inputs and outputs.

    Example:
        See docs/onnx_generation.md.
    """
    from feinwerk.onnx import export

    causal = _causal_model(model)
    config = causal.config
    _check(causal)
    layers = config.num_hidden_layers
    kv_heads, head_size = _kv_heads(config), _head_size(config)
    facts = {
        "layers": layers,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "vocab_size": config.vocab_size,
        "max_length": config.max_position_embeddings,
        "eos_token_id": _eos(causal, eos_token_id),
    }
    with _in_eval_mode(causal):
        return export(
            _Decoder(causal, last_logits_only).eval(),
            _example_inputs(layers, kv_heads, head_size),
            path,
            ops=ops,
            dynamic_shapes=_dynamic_shapes(layers),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *_cache("past_key_values", layers),
            ],
            output_names=["logits", *_cache("present", layers)],
            metadata={**options.pop("metadata", {}), METADATA_KEY: json.dumps(facts)},
            functions=partial(
                decoder_blocks.functions,
                config.num_attention_heads,
                kv_heads,
                head_size,
                config.rms_norm_eps,
            ),
            **options,
        )


def _causal_model(model: nn.Module) -> Any:
    """Return the transformers model inside `model`, after checking that it is one we know."""
    causal: Any = unwrapped(model)
    kind = getattr(getattr(causal, "config", None), "model_type", None)
    if kind not in MODEL_TYPES or not hasattr(causal, "lm_head"):
        rule = f"be a causal LM of type {', '.join(MODEL_TYPES)}"
        _checks.reject(TypeError, _OP, "model", rule, kind or type(model).__name__)
    return causal


def _check(causal: Any) -> None:
    config = causal.config
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        _checks.reject(ValueError, _OP, "model", "have no sliding window", window)
    rope = getattr(causal.model.rotary_emb, "rope_type", "default")
    if rope not in ROPE_TYPES:
        rule = f"have a rotary embedding of type {', '.join(ROPE_TYPES)}"
        _checks.reject(ValueError, _OP, "model", rule, rope)
    for name, parameter in causal.named_parameters():
        # ONNX Runtime's CPU has no MatMul, softmax or norm in bf16, and fp16 ones are emulated.
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            rule = "be torch.float32 (model.float() keeps NF4 codes as they are)"
            _checks.reject(TypeError, _OP, name, rule, parameter.dtype)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _eos(causal: Any, given: int | Sequence[int] | None) -> list[int]:
    found: Any = given
    if found is None:
        found = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = causal.config.eos_token_id
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token) for token in found]


def _cache(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def _example_inputs(layers: int, kv_heads: int, head_size: int) -> tuple[Any, ...]:
    """Return inputs whose sizes all differ and are above 1: a trace takes 0 and 1 for fixed."""
    batch, rows, past = 2, 3, 4
    empty = torch.zeros(batch, kv_heads, past, head_size)
    return (
        torch.zeros(batch, rows, dtype=torch.int64),
        torch.ones(batch, past + rows, dtype=torch.int64),
        torch.arange(past, past + rows).repeat(batch, 1),
        [empty.clone() for _ in range(2 * layers)],
    )


def _dynamic_shapes(layers: int) -> tuple[Any, ...]:
    batch, rows, past = "batch_size", "sequence_length", "past_sequence_length"
    return (
        {0: batch, 1: rows},
        {0: batch, 1: "total_sequence_length"},
        {0: batch, 1: rows},
        [{0: batch, 2: past}] * (2 * layers),
    )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Trace without dropout, and leave every module's mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
