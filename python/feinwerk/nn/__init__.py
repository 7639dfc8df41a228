"""NF4 modules, adapter modules, and the functions that put them into a model."""

from feinwerk.nn.adapter import Adapter
from feinwerk.nn.adapter_file import load_adapter, save_adapter
from feinwerk.nn.adapter_init import loftq
from feinwerk.nn.add_adapters import (
    adapter_parameters,
    adapters_of,
    add_adapters,
    disable_adapters,
    mark_trainable,
    merge_adapters,
)
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
    "adapter_parameters",
    "adapters_of",
    "add_adapters",
    "dequantize_model",
    "disable_adapters",
    "load_adapter",
    "loftq",
    "mark_trainable",
    "merge_adapters",
    "quantize_model",
    "save_adapter",
]
