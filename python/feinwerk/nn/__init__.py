"""Modules that hold their weight in NF4, and the function that puts them into a model."""

from feinwerk.nn.nf4_embedding import NF4Embedding
from feinwerk.nn.nf4_linear import NF4Linear
from feinwerk.nn.quantize import (
    QuantizedLayer,
    QuantizeReport,
    dequantize_model,
    quantize_model,
)

__all__ = [
    "NF4Embedding",
    "NF4Linear",
    "QuantizeReport",
    "QuantizedLayer",
    "dequantize_model",
    "quantize_model",
]
