"""Files that are on the disk when the call returns, checksums of their ranges, whole removals.

Writes, syncs and renames go through `os`, one call each: the tests stand between any two of them.
"""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What one write or read moves at most; large enough that the calls cost nothing beside the bytes.
CHUNK_BYTES = 1 << 20


class ChecksumFile:
    """A new file that is written once, front to back, with a CRC32 for every part of it.

    It keeps its own buffer: an `io.BufferedWriter` would write what is left when it is collected,
    after an error into whatever file has the descriptor by then.
    """

    def __init__(self, descriptor: int) -> None:
        """Start with an empty part."""
        self._descriptor = descriptor
        self._buffer = bytearray()
        self.size = 0
        self._start, self._crc32 = 0, 0

    def write(self, data: Any) -> int:
        """Append bytes; torch.save writes through this."""
        view = memoryview(data).cast("B")
        self._crc32 = zlib.crc32(view, self._crc32)
        if len(self._buffer) + view.nbytes > CHUNK_BYTES:
            self.finish()
        if view.nbytes > CHUNK_BYTES:
            self._write_all(view)
        else:
            self._buffer += view
        self.size += view.nbytes
        return view.nbytes

    def end_part(self) -> tuple[int, int, int]:
        """Return (offset, length, CRC32) of what was written since the last call."""
        part = self._start, self.size - self._start, self._crc32
        self._start, self._crc32 = self.size, 0
        return part

    def flush(self) -> None:
        """Do nothing: torch.save flushes after every tensor, and one flush at the end is enough."""

    def finish(self) -> None:
        """Hand every byte to the operating system."""
        self._write_all(memoryview(self._buffer))
        self._buffer = bytearray()

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._descriptor, view[:CHUNK_BYTES]) :]


@contextmanager
def new_file(path: Path) -> Iterator[ChecksumFile]:
    """Create a file that must not exist yet; when the block ends without an error it is synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        file = ChecksumFile(descriptor)
        yield file
        file.finish()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_range(path: Path, offset: int, length: int) -> Iterator[bytes]:
    """Yield the bytes of a part of a file in pieces; fewer than `length` if the file ends."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while length > 0:
            piece = file.read(min(length, CHUNK_BYTES))
            if not piece:
                return
            length -= len(piece)
            yield piece


def crc32_of_range(path: Path, offset: int, length: int) -> int:
    """Return the CRC32 of a part of a file without holding more of it than one piece."""
    crc32 = 0
    for piece in read_range(path, offset, length):
        crc32 = zlib.crc32(piece, crc32)
    return crc32


class FilePart(io.RawIOBase):
    """A part of a file as a file of its own, for zipfile and torch.load."""

    def __init__(self, file: io.RawIOBase | io.BufferedReader, start: int, length: int) -> None:
        """Begin at the begin."""
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the place, from the begin of the part."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, at most up to the end of the part."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = (self._file.readinto(view) if view else 0) or 0
        self._position += count
        return count


def remove_directory(path: Path, aside: Path) -> None:
    """Remove a directory that may look complete: under its own name it is there whole, or gone."""
    os.rename(path, aside)
    sync(path.parent)
    shutil.rmtree(aside)
