"""blockwise_dequantize: 8-bit codes into a codebook back to fp32 values."""

from feinwerk.ops.blockwise_dequantize.op import blockwise_dequantize

__all__ = ["blockwise_dequantize"]
