"""Optimizers whose states are quantized: plain, sharded, and resumable at any world size."""

from feinwerk.optim.adamw import AdamW
from feinwerk.optim.gradient_norm import gradient_norm

__all__ = ["AdamW", "gradient_norm"]
