"""Feinwerk: NF4 weights for fine-tuning and inference, bit-compatible with bitsandbytes."""

from feinwerk import backends, codebook, nn
from feinwerk.explain import explain
from feinwerk.nn import dequantize_model, quantize_model
from feinwerk.ops import (
    adamw_step,
    blockwise_dequantize,
    blockwise_quantize,
    dora_linear,
    grouped_lora_linear,
    lora_linear,
    nf4_dequantize,
    nf4_embedding,
    nf4_linear,
    nf4_linear_backward,
    nf4_quantize,
    row_norms,
    square_sum,
    weight_norm,
)
from feinwerk.plan import plan
from feinwerk.weight import NF4Weight

__version__ = "0.1.0"

__all__ = [
    "NF4Weight",
    "__version__",
    "adamw_step",
    "backends",
    "blockwise_dequantize",
    "blockwise_quantize",
    "codebook",
    "dequantize_model",
    "dora_linear",
    "explain",
    "grouped_lora_linear",
    "lora_linear",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_quantize",
    "nn",
    "plan",
    "quantize_model",
    "row_norms",
    "square_sum",
    "weight_norm",
]
