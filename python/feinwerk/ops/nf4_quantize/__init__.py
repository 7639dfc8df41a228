"""nf4_quantize: weights to 4-bit NF4 codes, with one absmax per block."""

from feinwerk.ops.nf4_quantize.op import nf4_quantize

__all__ = ["nf4_quantize"]
