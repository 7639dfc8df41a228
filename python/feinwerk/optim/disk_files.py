"""The two slot files and the lock of an offload directory: positioned reads and writes, and maps.

A step reads and writes through buffers and not through the maps: a full or failing disk is then an
OSError where it happens, and not a SIGBUS that kills the process. The maps serve who looks at the
states between steps (`state_dict`, checkpoints).
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import weakref
import zlib
from pathlib import Path

import torch

from feinwerk.optim.disk_errors import CorruptStates, ForeignStates, StatesInUse
from feinwerk.optim.disk_format import FILES, HEADER, SLOTS, Commit, Layout

# A write that returns when its own bytes are on the disk, and only those; elsewhere fdatasync.
_DSYNC = getattr(os, "RWF_DSYNC", 0)

# Locks of fcntl belong to a process (a forked worker does not keep them): two owners inside one
# process are told apart here.
_open_here: set[str] = set()


class DirectoryLock:
    """Makes a directory and keeps it for one owner, until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Lock it, or say who has it."""
        directory.mkdir(parents=True, exist_ok=True)
        real = os.path.realpath(directory)
        if real in _open_here:
            gc.collect()  # torch's optimizers are in cycles: one that was dropped may still be here
        if real in _open_here:
            raise StatesInUse(directory, "another object of this process")
        unknown = sorted(
            name for name in os.listdir(directory) if name.removesuffix(".tmp") not in FILES
        )
        if unknown:
            rule = "hold nothing but states"
            raise ForeignStates(directory, rule, f"{unknown[0]!r} among its files")
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise StatesInUse(directory, owner) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        _open_here.add(real)
        self.release = weakref.finalize(self, _unlock, handle, real)


def _unlock(handle: int, real: str) -> None:
    os.close(handle)
    _open_here.discard(real)


class Buffer:
    """Private memory that holds one record, header included, while its bucket is in flight."""

    def __init__(self, nbytes: int) -> None:
        """Take the memory, page-aligned."""
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def tensors(self, layout: Layout, bucket: int) -> dict[str, torch.Tensor]:
        """The tensors of a bucket, in this memory."""
        return _tensors(self.memory, 0, layout, bucket)


class SlotFiles:
    """Both slot files: records go between them and buffers, or are seen through their maps."""

    def __init__(self, directory: Path, layout: Layout, create: bool, fsync: bool) -> None:
        """Open or make both files."""
        self.layout, self.fsync = layout, fsync
        self.paths = [directory / name for name in SLOTS]
        self.handles: list[int] = []
        self.close = weakref.finalize(self, _close, self.handles)
        for path in self.paths:
            flags = os.O_RDWR | os.O_CLOEXEC
            if create:
                # Not the file that is there, cut to size: who has it mapped would be killed.
                path.unlink(missing_ok=True)
                flags |= os.O_CREAT | os.O_EXCL
            try:
                handle = os.open(path, flags, 0o600)
            except FileNotFoundError:
                raise CorruptStates(path, None, "exist", "no such file") from None
            self.handles.append(handle)
            if create:
                self._reserve(handle)
                if fsync:
                    os.fsync(handle)
        self.check_sizes()
        self.maps = [mmap.mmap(handle, layout.nbytes) for handle in self.handles]

    def _reserve(self, handle: int) -> None:
        """Take the room for every step at once: a full disk shows here and not in training."""
        try:
            os.posix_fallocate(handle, 0, self.layout.nbytes)
        except OSError:
            for taken in self.handles:
                os.ftruncate(taken, 0)
            raise

    def check_sizes(self) -> None:
        """Reject a slot file of another size: reading a map behind a file's end kills."""
        for path, handle in zip(self.paths, self.handles, strict=True):
            size = os.fstat(handle).st_size
            if size != self.layout.nbytes:
                raise CorruptStates(path, None, f"have {self.layout.nbytes} bytes", size)

    def read(self, bucket: int, slot: int, buffer: Buffer) -> None:
        """Fill a buffer with a record."""
        record = self.layout.records[bucket]
        target = memoryview(buffer.memory)[: HEADER + record.payload]
        done = 0
        while done < len(target):
            count = os.preadv(self.handles[slot], [target[done:]], record.offset + done)
            if count == 0:
                rule, got = f"have {len(target)} bytes", f"{done} bytes"
                raise CorruptStates(self.paths[slot], bucket, rule, got)
            done += count
        self._forget(slot, record.offset, record.size)

    def write(self, bucket: int, slot: int, generation: int, buffer: Buffer) -> Commit:
        """Write a buffer as the record of a generation, whole when this returns."""
        record = self.layout.records[bucket]
        source = memoryview(buffer.memory)[: HEADER + record.payload]
        crc = zlib.crc32(source[HEADER:])
        header = self.layout.header(bucket, slot, generation, crc)
        source[: len(header)] = header
        done, handle = 0, self.handles[slot]
        while done < len(source):
            flags = _DSYNC if self.fsync else 0
            done += os.pwritev(handle, [source[done:]], record.offset + done, flags)
        if self.fsync:
            if not _DSYNC:
                os.fdatasync(handle)
            self._forget(slot, record.offset, record.size)
        return Commit(slot, generation, crc)

    def verify(self, bucket: int, commit: Commit, buffer: Buffer) -> None:
        """Reject a record that is not the committed one, byte for byte."""
        self.read(bucket, commit.slot, buffer)
        path, record = self.paths[commit.slot], self.layout.records[bucket]
        content = memoryview(buffer.memory)[: HEADER + record.payload]
        self.layout.check_header(path, bucket, bytes(content[:HEADER]), commit)
        crc = zlib.crc32(content[HEADER:])
        if crc != commit.crc:
            raise CorruptStates(path, bucket, f"have CRC-32 {commit.crc:08x}", f"{crc:08x}")

    def tensors(self, bucket: int, slot: int) -> dict[str, torch.Tensor]:
        """The tensors of a record, mapped."""
        record = self.layout.records[bucket]
        return _tensors(self.maps[slot], record.offset, self.layout, bucket)

    def drop(self) -> None:
        """Take the pages of the maps out of this process's memory; the files keep them."""
        for slot, mapped in enumerate(self.maps):
            mapped.madvise(mmap.MADV_DONTNEED)
            if self.fsync:  # otherwise most are not written yet, and looking at each takes long
                self._forget(slot, 0, self.layout.nbytes)

    def _forget(self, slot: int, offset: int, size: int) -> None:
        """Leave no copy in the page cache (unwritten and mapped pages stay)."""
        os.posix_fadvise(self.handles[slot], offset, size, os.POSIX_FADV_DONTNEED)


def _tensors(memory: mmap.mmap, begin: int, layout: Layout, bucket: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, place in layout.records[bucket].places.items():
        if place.numel:
            flat = torch.frombuffer(
                memory, dtype=place.dtype, count=place.numel, offset=begin + place.offset
            )
        else:  # a rank without rows; frombuffer refuses an empty range
            flat = torch.empty(0, dtype=place.dtype)
        found[name] = flat.view(place.shape)
    return found


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
