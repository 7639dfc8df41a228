"""nf4_linear: x @ W^T with W held in NF4, and its own gradient for x."""

from feinwerk.ops.nf4_linear.op import nf4_linear, nf4_linear_backward

__all__ = ["nf4_linear", "nf4_linear_backward"]
