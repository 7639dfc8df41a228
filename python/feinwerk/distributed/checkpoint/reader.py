"""Reads tensors of a checkpoint into tensors and DTensors of any other sharding.

torch's planner says which box of which stored shard goes where; here the bytes are read, checked
against their checksum once more, and copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from feinwerk.distributed.checkpoint.files import FilePart, crc32_of_range
from feinwerk.distributed.checkpoint.manifest import Manifest, Shard
from feinwerk.distributed.checkpoint.values import DTYPES
from feinwerk.distributed.checkpoint.verify import describe_difference
from feinwerk.distributed.errors import CheckpointError, CorruptShard
from feinwerk.optim.state import to_local


def read_tensors(
    path: Path,
    manifest: Manifest,
    targets: Mapping[str, torch.Tensor],
    verify: bool,
    release: Callable[[], None],
) -> None:
    """Fill the local parts of `targets` from the checkpoint at `path`.

    Args:
        path: of the checkpoint.
        manifest: of the checkpoint; it has all the keys, in the same shapes.
        targets: tensors and DTensors by their keys.
        verify: whether to compare checksums.
        release: called when a tensor has been filled and its memory may go.

    Raises:
        CorruptShard: if a shard cannot be read or is not what was written.
        CheckpointError: if a target could not be filled.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), _metadata(manifest, targets), is_coordinator=False)
    by_shard: dict[tuple[str, int], list[ReadItem]] = {}
    elements = dict.fromkeys(targets, 0)
    for item in planner.create_local_plan().items:
        key, index = item.storage_index.fqn, item.storage_index.index
        assert index is not None  # the planner's place in the list of chunks
        by_shard.setdefault((key, index), []).append(item)
        elements[key] += math.prod(item.lengths)
    for key, target in targets.items():
        needed = to_local(target).numel()
        if elements[key] != needed:
            raise CheckpointError(
                f"{path}: {key} has {needed} elements on this rank, the plan to read it "
                f"{elements[key]}"
            )
    order = sorted(by_shard, key=lambda place: _place(manifest.tensors[place[0]].shards[place[1]]))
    for key, index in order:
        shard = manifest.tensors[key].shards[index]
        stored = read_shard(path, key, shard, verify)
        for item in by_shard[key, index]:
            part = stored
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(dim, start, length)
            planner.resolve_tensor(item).detach().copy_(part)
        release()


def read_shard(path: Path, key: str, shard: Shard, verify: bool) -> torch.Tensor:
    """Return one stored shard, on the CPU.

    Raises:
        CorruptShard: if it is not what was written.
    """
    file = path / shard.file
    try:
        if verify:
            reason = describe_difference(crc32_of_range(file, shard.start, shard.length), shard)
            if reason:
                raise CorruptShard(str(file), key, shard.rank, reason)
        with open(file, "rb", buffering=0) as stream:
            part = FilePart(stream, shard.start, shard.length)
            stored = torch.load(cast(Any, part), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CorruptShard(str(file), key, shard.rank, "the file is missing") from error
    except (OSError, CorruptShard):
        raise
    except Exception as error:  # what torch.load raises on damaged bytes is of many types
        raise CorruptShard(str(file), key, shard.rank, f"torch.load says {error}") from error
    if not isinstance(stored, torch.Tensor) or tuple(stored.shape) != shard.shape:
        reason = f"it must hold a tensor of shape {list(shard.shape)}"
        raise CorruptShard(str(file), key, shard.rank, reason)
    return stored


def _place(shard: Shard) -> tuple[str, int]:
    return shard.file, shard.start


def _metadata(manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> Metadata:
    described = {}
    for key in targets:
        tensor = manifest.tensors[key]
        described[key] = TensorStorageMetadata(
            TensorProperties(DTYPES[tensor.dtype]),
            torch.Size(tensor.shape),
            [
                ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.shape))
                for shard in tensor.shards
            ],
        )
    return Metadata(dict(described))
