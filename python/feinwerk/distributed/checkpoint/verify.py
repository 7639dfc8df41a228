"""verify_checkpoint: every byte of a checkpoint against its checksums, without a model."""

from __future__ import annotations

import os
from pathlib import Path

from feinwerk.distributed.checkpoint import manifest
from feinwerk.distributed.checkpoint.files import crc32_of_range
from feinwerk.distributed.checkpoint.manifest import METADATA_NAME, Manifest, Shard
from feinwerk.distributed.errors import CorruptShard


def verify_checkpoint(path: str | os.PathLike[str]) -> list[CorruptShard]:
    """Read a checkpoint and return all damage in it; an empty list says that it is intact.

    Needs no process group, no model and no optimizer, and holds 1 MiB at a time.

    Args:
        path: of one checkpoint, `<directory>/step-<N>`.

    Returns:
        An error for every damaged tensor part, missing file and file of another size, in the order
        of ranks, files and places.

    Raises:
        IncompleteCheckpoint: if it has no manifest, or one that this version cannot read.
        CorruptShard: if the manifest itself is damaged: then nothing can be said of the rest.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from feinwerk.distributed import save_checkpoint
        >>> from feinwerk.optim import AdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> path = save_checkpoint(tempfile.mkdtemp(), 10, model, AdamW(model.parameters()))
        >>> verify_checkpoint(path)
        []
    """
    path = Path(path)
    content = Manifest.from_bytes(path / manifest.FILE_NAME, manifest.read(path))
    return find_damage(path, content, 0, 1)


def find_damage(path: Path, content: Manifest, rank: int, world_size: int) -> list[CorruptShard]:
    """Check this rank's share of a checkpoint; rank 0 also looks at the files as such."""
    found = []
    for key, shard in _share(content.shards(), rank, world_size):
        reason = _damage(path, shard)
        if reason:
            found.append(CorruptShard(str(path / shard.file), key, shard.rank, reason))
    return found + (_damaged_files(path, content) if rank == 0 else [])


def _share(shards: list[tuple[str, Shard]], rank: int, world_size: int) -> list[tuple[str, Shard]]:
    """Return consecutive shards, about 1 / world_size of the bytes."""
    total = sum(shard.length for _, shard in shards)
    share, before = [], 0
    for key, shard in shards:
        if before * world_size // max(total, 1) == rank:
            share.append((key, shard))
        before += shard.length
    return share


def _damage(path: Path, shard: Shard) -> str:
    file = path / shard.file
    try:
        size = os.stat(file).st_size
        if size < shard.start + shard.length:
            return f"the file ends after {size} bytes, within or before this tensor"
        crc32 = crc32_of_range(file, shard.start, shard.length)
    except FileNotFoundError:
        return "the file is missing"
    return describe_difference(crc32, shard)


def describe_difference(crc32: int, shard: Shard) -> str:
    """Return an empty string if the checksum is the one that was recorded."""
    if crc32 == shard.crc32:
        return ""
    place = f"bytes {shard.start} to {shard.start + shard.length}"
    return f"{place} have checksum {crc32:08x}, {shard.crc32:08x} was written"


def _damaged_files(path: Path, content: Manifest) -> list[CorruptShard]:
    """Check what no tensor covers: bytes past the last one, and DCP's `.metadata`."""
    found = []
    for name, entry in content.files.items():
        file = path / name
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            size = -1
        if size > entry["size"]:
            reason = f"the file has {size} bytes, {entry['size']} were written"
            found.append(CorruptShard(str(file), None, entry["rank"], reason))
        elif name != METADATA_NAME:
            continue  # a missing or short file shows in its tensors
        elif size < 0:
            found.append(CorruptShard(str(file), None, 0, "the file is missing"))
        else:
            crc32 = crc32_of_range(file, 0, size)
            if size != entry["size"] or crc32 != entry["crc32"]:
                reason = f"the file has checksum {crc32:08x}, {entry['crc32']:08x} was written"
                found.append(CorruptShard(str(file), None, 0, reason))
    return found
