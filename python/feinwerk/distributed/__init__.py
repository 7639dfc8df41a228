"""Training on several ranks: checkpoints that survive crashes and any change of world size."""

from feinwerk.distributed.checkpoint import (
    LoadedCheckpoint,
    StoredCheckpoint,
    consolidate,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)
from feinwerk.distributed.errors import (
    CheckpointError,
    CorruptShard,
    IncompleteCheckpoint,
    MismatchedCheckpoint,
)
from feinwerk.distributed.replicas import verify_replicas
from feinwerk.distributed.row_shards import (
    load_full_state_dict,
    local_nf4_weight,
    sharded_row_norms,
    unshard_nf4,
)
from feinwerk.distributed.shard_nf4 import ShardedWeight, ShardReport, shard_nf4

__all__ = [
    "CheckpointError",
    "CorruptShard",
    "IncompleteCheckpoint",
    "LoadedCheckpoint",
    "MismatchedCheckpoint",
    "ShardReport",
    "ShardedWeight",
    "StoredCheckpoint",
    "consolidate",
    "list_checkpoints",
    "load_checkpoint",
    "load_full_state_dict",
    "load_latest",
    "local_nf4_weight",
    "save_checkpoint",
    "shard_nf4",
    "sharded_row_norms",
    "unshard_nf4",
    "verify_checkpoint",
    "verify_replicas",
]
