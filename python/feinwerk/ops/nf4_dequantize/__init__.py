"""nf4_dequantize: 4-bit NF4 codes back to a dense weight."""

from feinwerk.ops.nf4_dequantize.op import nf4_dequantize

__all__ = ["nf4_dequantize"]
