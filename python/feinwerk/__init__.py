"""Feinwerk: NF4 weights for fine-tuning and inference, bit-compatible with bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feinwerk import backends, codebook
from feinwerk.ops import (
    blockwise_dequantize,
    blockwise_quantize,
    nf4_dequantize,
    nf4_embedding,
    nf4_linear,
    nf4_linear_backward,
    nf4_quantize,
)

if TYPE_CHECKING:
    from feinwerk import nn
    from feinwerk.nn import quantize_model
    from feinwerk.weight import NF4Weight

__version__ = "0.1.0"

__all__ = [
    "NF4Weight",
    "__version__",
    "backends",
    "blockwise_dequantize",
    "blockwise_quantize",
    "codebook",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_quantize",
    "nn",
    "quantize_model",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "NF4Weight":
        return importlib.import_module("feinwerk.weight").NF4Weight
    if name == "nn":
        return importlib.import_module("feinwerk.nn")
    if name == "quantize_model":
        return importlib.import_module("feinwerk.nn").quantize_model
    raise AttributeError(f"module 'feinwerk' has no attribute {name!r}")
