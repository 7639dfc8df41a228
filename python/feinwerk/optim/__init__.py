"""Optimizers whose states are quantized: plain, sharded, and resumable at any world size."""

from feinwerk.optim.adamw import AdamW
from feinwerk.optim.disk_errors import OffloadError
from feinwerk.optim.errors import Disagreement, PeerFailure, PhaseTimeout, ShardingError
from feinwerk.optim.grad_scaler import GradScaler
from feinwerk.optim.gradient_norm import gradient_norm
from feinwerk.optim.sharded_adamw import ShardedAdamW

__all__ = [
    "AdamW",
    "Disagreement",
    "GradScaler",
    "OffloadError",
    "PeerFailure",
    "PhaseTimeout",
    "ShardedAdamW",
    "ShardingError",
    "gradient_norm",
]
