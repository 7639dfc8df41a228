"""blockwise_quantize: fp32 values to 8-bit codes into a codebook, one absmax per block."""

from feinwerk.ops.blockwise_quantize.op import blockwise_quantize

__all__ = ["blockwise_quantize"]
