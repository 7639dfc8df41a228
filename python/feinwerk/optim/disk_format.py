"""What lies in an offload directory: the layout of its records, their headers, the commit file.

    lock            one process at a time
    layout          JSON + CRC-32: what every record holds; written once
    slot-a, slot-b  the records of all buckets, each at the same place in both files
    generation      JSON + CRC-32: which slot of each bucket counts; replaced by rename

A record is a header of `HEADER` bytes, then the tensors of one bucket, each aligned to 64 bytes;
it begins at a multiple of `ALIGNMENT`, which every page size divides:

    | header | exp_avg_codes | exp_avg_absmax | ... | step | padding | header | ...
    0        4096                                            65536 k
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from feinwerk.optim.disk_errors import CorruptStates, ForeignStates, IncompleteStates

FORMAT = "feinwerk disk states"
VERSION = 1
ALIGNMENT = 65536
HEADER = 4096
FILES = ("lock", "layout", "slot-a", "slot-b", "generation")
SLOTS = ("slot-a", "slot-b")

TensorSpec = tuple[torch.dtype, tuple[int, ...]]

# magic, version, slot, bucket, generation, payload bytes, payload CRC-32, digest of the layout
_HEADER = struct.Struct("<8sIIQQQI32s")
_MAGIC = b"fwstates"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor lies in its record, from the record's begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Record:
    """Where one bucket lies in a slot file."""

    offset: int
    size: int  # header and padding included
    payload: int  # bytes of tensors, and of the padding between them
    places: Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class Commit:
    """What the generation file says of one bucket."""

    slot: int
    generation: int
    crc: int


class Layout:
    """The places of all buckets, and the digest that every header and commit carries."""

    def __init__(self, buckets: Sequence[Mapping[str, TensorSpec]], identity: str) -> None:
        """Lay out buckets, in order."""
        self.identity = identity
        self.buckets = [
            {name: (str(dtype), list(shape)) for name, (dtype, shape) in bucket.items()}
            for bucket in buckets
        ]
        self.records: list[Record] = []
        begin = 0
        for bucket in buckets:
            offset, places = HEADER, {}
            for name, (dtype, shape) in bucket.items():
                numel = 1
                for size in shape:
                    numel *= size
                places[name] = Place(dtype, tuple(shape), offset, numel)
                offset += -(-numel * dtype.itemsize // 64) * 64
            size = -(-offset // ALIGNMENT) * ALIGNMENT
            self.records.append(Record(begin, size, offset - HEADER, places))
            begin += size
        self.nbytes = max(begin, ALIGNMENT)  # of one slot file; an empty file cannot be mapped
        self.digest = hashlib.sha256(self.text().encode()).digest()

    def text(self) -> str:
        """The layout as the layout file says it."""
        content = {"identity": self.identity, "alignment": ALIGNMENT, "buckets": self.buckets}
        return json.dumps({"format": FORMAT, "version": VERSION, **content})

    def check(self, path: Path) -> None:
        """Reject a layout file that says something else than this layout, naming the first."""
        theirs = read_checked(path)
        if theirs["identity"] != self.identity:
            _foreign(path, f"be of {self.identity!r}", repr(theirs["identity"]))
        if theirs["alignment"] != ALIGNMENT:
            _foreign(path, f"have alignment {ALIGNMENT}", theirs["alignment"])
        if len(theirs["buckets"]) != len(self.buckets):
            _foreign(path, f"have {len(self.buckets)} buckets", len(theirs["buckets"]))
        for i, (ours, other) in enumerate(zip(self.buckets, theirs["buckets"], strict=True)):
            if list(ours) != list(other):
                _foreign(path, f"have tensors {list(ours)} in bucket {i}", list(other))
            for name, (dtype, shape) in ours.items():
                if other[name] != [dtype, shape]:
                    rule = f"have {dtype} {shape} as {name!r} of bucket {i}"
                    _foreign(path, rule, f"{other[name][0]} {other[name][1]}")

    def header(self, bucket: int, slot: int, generation: int, crc: int) -> bytes:
        """The header of a complete record, its own CRC-32 last."""
        payload = self.records[bucket].payload
        fields = (_MAGIC, VERSION, slot, bucket, generation, payload, crc, self.digest)
        packed = _HEADER.pack(*fields)
        return packed + struct.pack("<I", zlib.crc32(packed))

    def check_header(self, path: Path, bucket: int, found: bytes, commit: Commit) -> None:
        """Reject a record that is not the one that was committed."""
        expected = self.header(bucket, commit.slot, commit.generation, commit.crc)
        if found[: len(expected)] == expected:
            return
        packed = found[: _HEADER.size]
        (crc,) = struct.unpack_from("<I", found, _HEADER.size)
        if zlib.crc32(packed) != crc:
            raise CorruptStates(path, bucket, "have an intact header", "another checksum")
        fields = _HEADER.unpack(packed)
        if fields[0] != _MAGIC or fields[1] != VERSION or fields[7] != self.digest:
            _foreign(path, f"hold bucket {bucket} of this layout", "a record of another one")
        got = f"generation {fields[4]} of bucket {fields[3]} in slot {fields[2]}"
        rule = f"be generation {commit.generation} in slot {commit.slot}"
        raise CorruptStates(path, bucket, rule, got)

    def commit_text(self, generation: int, commits: Sequence[Commit]) -> str:
        """What the generation file says."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "layout": self.digest.hex(),
            "generation": generation,
            "records": [dataclasses.astuple(commit) for commit in commits],
        }
        return json.dumps(content)

    def read_commit(self, path: Path) -> tuple[int, list[Commit]]:
        """The generation that counts, and where its records are.

        Raises:
            IncompleteStates: if no step was ever committed.
            CorruptStates: if the file is not as it was written.
            ForeignStates: if it belongs to another layout.
        """
        if not path.exists():
            raise IncompleteStates(path)
        content = read_checked(path)
        if content["layout"] != self.digest.hex():
            _foreign(path, f"belong to layout {self.digest.hex()[:12]}", content["layout"][:12])
        commits = [Commit(*fields) for fields in content["records"]]
        return int(content["generation"]), commits


def read_checked(path: Path) -> dict[str, Any]:
    """The content of a file that `write_checked` wrote."""
    try:
        text, _, crc = path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    except UnicodeDecodeError:
        raise CorruptStates(path, None, "be text", "other bytes") from None
    except OSError as error:
        raise CorruptStates(path, None, "be readable", error) from error
    if not text or crc != f"{zlib.crc32(text.encode()):08x}":
        raise CorruptStates(path, None, "end with its CRC-32", "another checksum")
    content: dict[str, Any] = json.loads(text)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        got = f"{content.get('format')!r} version {content.get('version')}"
        _foreign(path, f"be {FORMAT!r} version {VERSION}", got)
    return content


def write_checked(path: Path, text: str, fsync: bool) -> None:
    """Replace a file by `text` and its CRC-32: at any moment it is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(f"{text}\n{zlib.crc32(text.encode()):08x}\n".encode())
        while rest:
            rest = rest[os.write(handle, rest) :]
        if fsync:
            os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    if fsync:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new files in a directory last."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _foreign(path: Path, rule: str, got: object) -> NoReturn:
    raise ForeignStates(path, rule, got)
