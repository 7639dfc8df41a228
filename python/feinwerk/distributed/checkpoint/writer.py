"""Writes tensors in DCP's format: its plan, its files, its `.metadata`; and a CRC32 for each item.

torch's own FileSystemWriter loses the errors of its threads and syncs before it has flushed, so the
data files are written here; what is in them, and `.metadata`, are torch's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from feinwerk.distributed.checkpoint.agreement import Peers
from feinwerk.distributed.checkpoint.files import crc32_of_range, new_file, sync
from feinwerk.distributed.checkpoint.manifest import METADATA_NAME, Shard, StoredTensor
from feinwerk.distributed.checkpoint.values import dtype_name


@dataclass(frozen=True)
class WrittenItem:
    """What a rank wrote for one item of the plan."""

    result: WriteResult
    key: str
    shard: Shard


class _MetadataWriter(FileSystemWriter):
    """torch's writer of `.metadata`, without the absolute path of a temporary directory in it."""

    def __init__(self, path: Path, name: str, nonce: str) -> None:
        super().__init__(path, overwrite=False)
        self._meta = StorageMeta(checkpoint_id=name, save_id=nonce)

    def storage_meta(self) -> StorageMeta:
        return self._meta


@dataclass(frozen=True)
class Written:
    """What all ranks wrote, as rank 0 knows it: DCP's metadata, and the items of every rank."""

    metadata: Metadata
    items: list[list[WrittenItem]]

    def tensors(self) -> dict[str, StoredTensor]:
        """Return what the manifest says of the tensors."""
        shards: dict[str, list[Shard]] = {key: [] for key in self.metadata.state_dict_metadata}
        for item in itertools.chain(*self.items):
            shards[item.key].append(item.shard)
        tensors = {}
        for key, described in self.metadata.state_dict_metadata.items():
            described = cast(TensorStorageMetadata, described)
            ordered = sorted(shards[key], key=lambda shard: shard.offsets)
            dtype = dtype_name(described.properties.dtype)
            tensors[key] = StoredTensor(dtype, tuple(described.size), tuple(ordered))
        return tensors

    def finish(self, path: Path, name: str, nonce: str) -> dict[str, dict[str, int]]:
        """Write DCP's `.metadata` into `path`; return what the manifest says of the files."""
        files: dict[str, dict[str, int]] = {}
        for item in itertools.chain(*self.items):
            entry = files.setdefault(item.shard.file, {"size": 0, "rank": item.shard.rank})
            entry["size"] = max(entry["size"], item.shard.start + item.shard.length)
        results = [[item.result for item in items] for items in self.items]
        _MetadataWriter(path, name, nonce).finish(self.metadata, results)
        sync(path / METADATA_NAME)
        size = os.stat(path / METADATA_NAME).st_size
        crc32 = crc32_of_range(path / METADATA_NAME, 0, size)
        files[METADATA_NAME] = {"size": size, "rank": 0, "crc32": crc32}
        return files


def write_tensors(
    peers: Peers, path: Path, state_dict: dict[str, Any], release: Callable[[], None]
) -> Written | None:
    """Write a nested state dict of tensors and DTensors into the directory `path`.

    Args:
        peers: the ranks that write together; every one has the same keys.
        path: an existing directory without a checkpoint in it.
        state_dict: nested dicts of tensors.
        release: called when a tensor has been written and its memory may go.

    Returns:
        On rank 0 what was written, elsewhere None.

    Raises:
        CheckpointError: on every rank, if one of them could not plan or write.
    """
    planner = DefaultSavePlanner()
    metadata: list[Metadata] = []

    def local_plan() -> SavePlan:
        planner.set_up_planner(state_dict, is_coordinator=peers.is_first)
        return planner.create_local_plan()

    def global_plan(plans: list[SavePlan]) -> list[SavePlan]:
        divided, described = planner.create_global_plan(plans)
        metadata.append(described)
        return divided

    plan = planner.finish_plan(peers.plan("plan", local_plan, global_plan))
    everything: list[list[WrittenItem]] = []

    def write() -> list[WrittenItem]:
        name = f"__{peers.rank}_0.distcp"
        return _write_file(path, name, peers.rank, plan.items, planner, release)

    def collect(written: list[list[WrittenItem]]) -> list[None]:
        everything.extend(written)
        return [None] * peers.world_size

    # What was written goes to rank 0 only; that it was written, everybody learns.
    peers.plan("write", write, collect)
    return Written(metadata[0], everything) if peers.is_first else None


def _write_file(
    path: Path,
    name: str,
    rank: int,
    items: list[WriteItem],
    planner: DefaultSavePlanner,
    release: Callable[[], None],
) -> list[WrittenItem]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: rank 0 has made this directory, but this rank does not see it; "
            "all ranks must save to one shared file system"
        )
    if not items:
        return []
    written = []
    with new_file(path / name) as file:
        for item in items:
            tensor = cast(torch.Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save would write the whole storage of a view
            torch.save(tensor, cast(Any, file))
            start, length, crc32 = file.end_part()
            shard = Shard(
                tuple(item.index.offset or ()), tuple(tensor.shape), name, start, length, crc32,
                rank,
            )  # fmt: skip
            info = _StorageInfo(name, start, length)
            result = WriteResult(item.index, length, info)
            written.append(WrittenItem(result, item.index.fqn, shard))
            release()
    sync(path)
    return written
