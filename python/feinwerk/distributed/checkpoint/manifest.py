"""manifest.json: what a checkpoint holds, byte range by byte range; written last, so it seals it.

```
   {"format": "feinwerk-checkpoint", "version": 1, "step": 100, "world_size": 2, "engine": "fsdp2",
    "parameters": "trainable", "nonce": "...", "torch": "2.13.0",
    "optimizer": {"class": "AdamW", "groups": [{"parameters": [<name>, ...], "options": {...}}]},
    "scheduler": ..., "extra": ..., "rank_extra": ...,                  (see values.py)
    "tensors": {"model.<name>": {"dtype": "float32", "shape": [8, 4], "shards": [
        {"offsets": [0, 0], "shape": [4, 4], "file": "__0_0.distcp", "start": 0, "length": 1253,
         "crc32": 123, "rank": 0}, ...]}, "optimizer.<name>.<state>": ...},
    "files": {"__0_0.distcp": {"size": ..., "rank": 0}, ".metadata": {..., "crc32": ...}},
    "crc32": <of this text without this entry>}
```
Loading needs this file and the data files only; DCP's `.metadata`, a pickle, is for DCP's tools.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feinwerk.distributed.checkpoint.values import DTYPES
from feinwerk.distributed.errors import CorruptShard, IncompleteCheckpoint

FILE_NAME = "manifest.json"
METADATA_NAME = ".metadata"
FORMAT = "feinwerk-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, and the bytes that hold it (one `torch.save` archive)."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int
    crc32: int
    rank: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor: dtype, global shape, and the shards that tile it."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Group:
    """A parameter group: the names of its parameters, in order, and its encoded options."""

    parameters: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; see the head of this file."""

    step: int
    world_size: int
    engine: str
    parameters: str
    nonce: str
    torch: str
    optimizer_class: str
    groups: tuple[Group, ...]
    tensors: dict[str, StoredTensor]
    files: dict[str, dict[str, int]]
    scheduler: Any = None
    extra: Any = None
    rank_extra: Any = field(default=None)

    def to_bytes(self) -> bytes:
        """Return the text of the file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "engine": self.engine,
            "parameters": self.parameters,
            "nonce": self.nonce,
            "torch": self.torch,
            "optimizer": {
                "class": self.optimizer_class,
                "groups": [
                    {"parameters": list(group.parameters), "options": group.options}
                    for group in self.groups
                ],
            },
            "scheduler": self.scheduler,
            "extra": self.extra,
            "rank_extra": self.rank_extra,
            "tensors": {
                key: {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "shards": [_shard_fields(shard) for shard in tensor.shards],
                }
                for key, tensor in sorted(self.tensors.items())
            },
            "files": dict(sorted(self.files.items())),
        }
        return _seal(content)

    @classmethod
    def from_bytes(cls, path: Path, data: bytes) -> Manifest:
        """Read the text of the file at `path`, and check it against its checksum and itself.

        Raises:
            CorruptShard: if the text is not the one that was written.
            IncompleteCheckpoint: if it was written by a later version, or its shards do not tile
                their tensors and files.
        """
        try:
            content = json.loads(data)
            crc32 = content.pop("crc32")
            intact = data == _seal(content) and crc32 == zlib.crc32(_text(content))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            intact = False
        if not intact:
            reason = "the text does not have the checksum that it ends with"
            raise CorruptShard(str(path), None, 0, reason)
        if content["format"] != FORMAT or content["version"] != VERSION:
            found = f"{content['format']} version {content['version']}"
            reason = f"this Feinwerk reads {FORMAT} version {VERSION}, got {found}"
            raise IncompleteCheckpoint(str(path.parent), reason)
        manifest = cls(
            **{
                name: content[name]
                for name in (
                    "step", "world_size", "engine", "parameters", "nonce", "torch", "scheduler",
                    "extra", "rank_extra", "files",
                )
            },
            optimizer_class=content["optimizer"]["class"],
            groups=tuple(
                Group(tuple(group["parameters"]), group["options"])
                for group in content["optimizer"]["groups"]
            ),
            tensors={
                key: StoredTensor(
                    tensor["dtype"],
                    tuple(tensor["shape"]),
                    tuple(_read_shard(shard) for shard in tensor["shards"]),
                )
                for key, tensor in content["tensors"].items()
            },
        )  # fmt: skip
        problem = manifest.find_gap()
        if problem:
            raise IncompleteCheckpoint(str(path.parent), problem)
        return manifest

    def find_gap(self) -> str:
        """Return why the shards do not tile every tensor and every file, or an empty string."""
        ranges: dict[str, list[tuple[int, int]]] = {
            name: [] for name in self.files if name != METADATA_NAME
        }
        for key, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                return f"{key} has the unknown dtype {tensor.dtype}"
            if not _tiles(tensor):
                return f"the shards of {key} do not cover it exactly once"
            for shard in tensor.shards:
                if shard.file not in ranges or "/" in shard.file:
                    return f"{key} lies in the unlisted file {shard.file}"
                ranges[shard.file].append((shard.start, shard.length))
        for name, parts in ranges.items():
            end = 0
            for start, length in sorted(parts):
                if start != end:
                    return f"the tensors in {name} leave a gap or overlap at byte {end}"
                end += length
            if end != self.files[name]["size"]:
                return f"{name} has {self.files[name]['size']} bytes, its tensors {end}"
        return ""

    def shards(self) -> list[tuple[str, Shard]]:
        """Return (key, shard) of everything, in the order of files and places in them."""
        found = [(key, shard) for key, tensor in self.tensors.items() for shard in tensor.shards]
        return sorted(found, key=lambda item: (item[1].rank, item[1].file, item[1].start))


def read(path: Path) -> bytes:
    """Return the bytes of the manifest of the checkpoint at `path`.

    Raises:
        IncompleteCheckpoint: if there is none.
    """
    try:
        return (path / FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"there is no {FILE_NAME}" if path.is_dir() else "there is no such directory"
        raise IncompleteCheckpoint(str(path), reason) from error


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _seal(content: dict[str, Any]) -> bytes:
    return _text({**content, "crc32": zlib.crc32(_text(content))}) + b"\n"


def _shard_fields(shard: Shard) -> dict[str, Any]:
    return {
        "offsets": list(shard.offsets), "shape": list(shard.shape), "file": shard.file,
        "start": shard.start, "length": shard.length, "crc32": shard.crc32, "rank": shard.rank,
    }  # fmt: skip


def _read_shard(fields: dict[str, Any]) -> Shard:
    boxes = {"offsets": tuple(fields["offsets"]), "shape": tuple(fields["shape"])}
    return Shard(**{**fields, **boxes})


def _tiles(tensor: StoredTensor) -> bool:
    """Whether the shards lie inside the tensor, apart from each other, and fill it."""
    filled = 0
    boxes: list[Shard] = []
    for shard in tensor.shards:
        if len(shard.shape) != len(tensor.shape) or len(shard.offsets) != len(tensor.shape):
            return False
        for offset, size, whole in zip(shard.offsets, shard.shape, tensor.shape, strict=True):
            if offset < 0 or size < 0 or offset + size > whole:
                return False
        filled += math.prod(shard.shape)
        if math.prod(shard.shape):
            boxes.append(shard)
    if not tensor.shape:
        return len(boxes) == 1
    return filled == math.prod(tensor.shape) and not _overlap(boxes)


def _overlap(boxes: Sequence[Shard]) -> bool:
    """Whether two boxes share an element: sweep dimension 0, comparing only what is open there."""
    open_boxes: list[Shard] = []
    for box in sorted(boxes, key=lambda b: b.offsets[0]):
        open_boxes = [b for b in open_boxes if b.offsets[0] + b.shape[0] > box.offsets[0]]
        for other in open_boxes:
            pairs = zip(box.offsets, box.shape, other.offsets, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in pairs):
                return True
        open_boxes.append(box)
    return False
