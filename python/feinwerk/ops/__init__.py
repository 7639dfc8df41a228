"""The operations, one folder each; their public functions are here under the same names."""

from feinwerk.ops.adamw_step import adamw_step
from feinwerk.ops.adapters import dora_linear, grouped_lora_linear, lora_linear
from feinwerk.ops.blockwise_dequantize import blockwise_dequantize
from feinwerk.ops.blockwise_quantize import blockwise_quantize
from feinwerk.ops.nf4_dequantize import nf4_dequantize
from feinwerk.ops.nf4_embedding import nf4_embedding
from feinwerk.ops.nf4_linear import nf4_linear, nf4_linear_backward
from feinwerk.ops.nf4_quantize import nf4_quantize
from feinwerk.ops.square_sum import square_sum
from feinwerk.ops.weight_norm import row_norms, weight_norm

__all__ = [
    "adamw_step",
    "blockwise_dequantize",
    "blockwise_quantize",
    "dora_linear",
    "grouped_lora_linear",
    "lora_linear",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_quantize",
    "row_norms",
    "square_sum",
    "weight_norm",
]
