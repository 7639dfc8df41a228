"""Architecture: the sizes of a decoder model, from its config: Llama and what is built alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feinwerk import _checks
from feinwerk.plan import presets

OP = "plan"
MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
# Where config.json leaves a field out, the class of this model type has these.
_TIED_BY_DEFAULT = ("tie_word_embeddings", False)
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A torch.nn.Linear of the model: y[N] = x[K] W^T (+ bias)."""

    name: str
    N: int
    K: int
    bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder model.

    Attributes:
        model_type: as transformers calls it.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream, H.
        intermediate_size: width of the MLP, I.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        rotary_dim: width of a head that is rotated.
        tied: the head's weight is the embedding.
        linears: of one layer, in the order of the forward.
        qk_norm: queries and keys are normalized by head (Qwen3).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    tied: bool
    linears: tuple[Linear, ...]
    qk_norm: bool = False

    @property
    def norms(self) -> dict[str, int]:
        """The norms of one layer, and the elements of each."""
        found = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.qk_norm:
            found |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        return found

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        layer = sum(linear.N * (linear.K + linear.bias) for linear in self.linears)
        layer += sum(self.norms.values())
        tables = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.layers * layer + tables + self.hidden_size

    @property
    def linear_parameters(self) -> int:
        """Number of weights in the layers' Linears: what NF4 and adapters are about."""
        return self.layers * sum(linear.N * linear.K for linear in self.linears)

    def linear(self, name: str) -> Linear:
        """The Linear of a layer by name."""
        return next(linear for linear in self.linears if linear.name == name)


def architecture(model: Any) -> Architecture:
    """Return the architecture of what `plan` takes as a model.

    Args:
        model: the name of a preset, the path of a config.json or of a folder with one, a config as
            a dict, a config of transformers, or a model with such a `config`.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the name is unknown, the config lacks sizes or is of another kind of model.

    Example:
        >>> architecture("llama-3.2-1b").parameters
        1235814400
    """
    return from_config(_config(model))


def _config(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    if isinstance(model, str | Path):
        found = presets.find(str(model))
        return _read(Path(model)) if found is None else found
    config = getattr(model, "config", model)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        rule = "be the name of a preset, the path of a config.json, or a config"
        _checks.reject(TypeError, OP, "model", rule, type(model).__name__)
    values: Mapping[str, Any] = to_dict()
    return values


def _read(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        rule = f"be the path of a config.json or one of {', '.join(presets.PRESETS)}"
        _checks.reject(ValueError, OP, "model", rule, path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _checks.reject(ValueError, OP, "model", "be a readable JSON file", f"{file}: {error}")
    if not isinstance(values, dict):
        rule = "be a JSON object"
        _checks.reject(ValueError, OP, "model", rule, f"{file} with a {type(values).__name__}")
    return values


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json describes.

    Args:
        config: its fields.

    Raises:
        ValueError: if a size is missing or no whole number above 0, or the model of another kind.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        rule = f"be one of {', '.join(MODEL_TYPES)}"
        _checks.reject(ValueError, OP, "model_type", rule, repr(kind))
    vocab, H, inner, layers, heads = (_size(config, name) for name in _SIZES)
    kv_heads = _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        rule = f"divide num_attention_heads = {heads}"
        _checks.reject(ValueError, OP, "num_key_value_heads", rule, kv_heads)
    if config.get("head_dim") is None and H % heads:
        rule = f"divide hidden_size = {H} where there is no head_dim"
        _checks.reject(ValueError, OP, "num_attention_heads", rule, heads)
    head_dim = _size(config, "head_dim", 128 if kind == "qwen3" else H // heads)
    # Hidden in rope_parameters since transformers 5.
    rope = config.get("rope_parameters") or {}
    factor = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    return Architecture(
        model_type=str(kind), vocab_size=vocab, hidden_size=H, intermediate_size=inner,
        layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        rotary_dim=int(head_dim * factor) if kind == "phi3" else head_dim,
        tied=bool(config.get(*_TIED_BY_DEFAULT)),
        linears=_linears(config, str(kind), H, inner, heads * head_dim, kv_heads * head_dim),
        qk_norm=kind == "qwen3",
    )  # fmt: skip


def _linears(
    config: Mapping[str, Any], kind: str, H: int, inner: int, q: int, kv: int
) -> tuple[Linear, ...]:
    if kind == "phi3":
        return (
            Linear("qkv_proj", q + 2 * kv, H), Linear("o_proj", H, q),
            Linear("gate_up_proj", 2 * inner, H), Linear("down_proj", H, inner),
        )  # fmt: skip
    flagged = kind in ("llama", "qwen3") and bool(config.get("attention_bias"))
    qkv_bias = kind == "qwen2" or flagged
    mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))
    return (
        Linear("q_proj", q, H, qkv_bias), Linear("k_proj", kv, H, qkv_bias),
        Linear("v_proj", kv, H, qkv_bias), Linear("o_proj", H, q, flagged),
        Linear("gate_proj", inner, H, mlp_bias), Linear("up_proj", inner, H, mlp_bias),
        Linear("down_proj", H, inner, mlp_bias),
    )  # fmt: skip


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "no such field" if value is None else repr(value)
        _checks.reject(ValueError, OP, name, "be a whole number of at least 1", got)
    return value


def bytes_of(shape: tuple[int, ...], element_size: int) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * element_size
