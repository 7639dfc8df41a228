"""The numbers of well-known models' config.json files, so that a plan needs neither files nor net.

Only sizes: what decides memory. Names are those of the models on the Hugging Face hub in lower
case, without owner and without endings such as -Instruct, which share a config.
"""

from __future__ import annotations

from typing import Any

_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip

# model type and the fields above; head_dim is hidden_size / num_attention_heads in all of them.
_SIZES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    "smollm2-360m": ("llama", 49152, 960, 2560, 32, 15, 5, True),
    "smollm2-1.7b": ("llama", 49152, 2048, 8192, 24, 32, 32, True),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, True),
    "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "llama-3-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, False),
    "llama-2-13b": ("llama", 32000, 5120, 13824, 40, 40, 40, False),
    "llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, False),
    "mistral-7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, False),
    "phi-3-mini": ("phi3", 32064, 3072, 8192, 32, 32, 32, False),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": ("qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "qwen2.5-14b": ("qwen2", 152064, 5120, 13824, 48, 40, 8, False),
    "qwen2.5-32b": ("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "qwen2.5-72b": ("qwen2", 152064, 8192, 29568, 80, 64, 8, False),
}
_ALIASES = {
    "smollm2": "smollm2-135m",
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.3-70b": "llama-3-70b",
}
_ENDINGS = ("-instruct", "-chat", "-hf")

PRESETS = tuple(_SIZES)


def find(name: str) -> dict[str, Any] | None:
    """Return the config of a preset, as its config.json has it; None for an unknown name.

    Args:
        name: of a preset, or as on the hub: "meta-llama/Llama-3.2-1B-Instruct".

    Example:
        >>> find("meta-llama/Llama-2-7b-chat-hf")["num_hidden_layers"]
        32
    """
    key = name.rpartition("/")[2].lower()
    while key.endswith(_ENDINGS):
        key = key.rpartition("-")[0]
    key = _ALIASES.get(key, key)
    if key not in _SIZES:
        return None
    model_type, *sizes = _SIZES[key]
    return {"model_type": model_type, **dict(zip(_FIELDS, sizes, strict=True))}
