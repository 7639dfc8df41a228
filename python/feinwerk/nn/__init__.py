"""Modules with NF4 weights and modules with adapters, and the functions that put them in a model."""

from feinwerk.nn.adapter import Adapter
from feinwerk.nn.adapter_init import loftq
from feinwerk.nn.lora import DoRALinear, LoRALinear
from feinwerk.nn.lora_conv import DoRAConv, LoRAConv
from feinwerk.nn.lora_embedding import DoRAEmbedding, LoRAEmbedding
from feinwerk.nn.merge import MergeReport
from feinwerk.nn.nf4_embedding import NF4Embedding
from feinwerk.nn.nf4_linear import NF4Linear
from feinwerk.nn.quantize import (
    QuantizedLayer,
    QuantizeReport,
    dequantize_model,
    quantize_model,
)

__all__ = [
    "Adapter",
    "DoRAConv",
    "DoRAEmbedding",
    "DoRALinear",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "NF4Embedding",
    "NF4Linear",
    "QuantizeReport",
    "QuantizedLayer",
    "dequantize_model",
    "loftq",
    "quantize_model",
]
