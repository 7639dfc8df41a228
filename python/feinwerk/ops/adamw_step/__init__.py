"""adamw_step: one AdamW step over a list of parameters, in place, states in 32, 16 or 8 bits."""

from feinwerk.ops.adamw_step.op import adamw_step

__all__ = ["adamw_step"]
