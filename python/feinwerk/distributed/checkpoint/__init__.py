"""Checkpoints: written atomically, checked to the bit, loadable at any world size and engine."""

from feinwerk.distributed.checkpoint.consolidate import consolidate
from feinwerk.distributed.checkpoint.directories import StoredCheckpoint, list_checkpoints
from feinwerk.distributed.checkpoint.load import LoadedCheckpoint, load_checkpoint, load_latest
from feinwerk.distributed.checkpoint.save import save_checkpoint
from feinwerk.distributed.checkpoint.verify import verify_checkpoint

__all__ = [
    "LoadedCheckpoint",
    "StoredCheckpoint",
    "consolidate",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "save_checkpoint",
    "verify_checkpoint",
]
