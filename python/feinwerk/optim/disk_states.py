"""Optimizer states on disk: a step streams the buckets through three buffers, and commits at once.

While bucket i is stepped, a thread reads i + 1 and another writes i - 1. A step writes into the
slot of each bucket that does not count, then one small file, replaced by rename, makes it count.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from feinwerk import _checks
from feinwerk.optim.disk_errors import OffloadError
from feinwerk.optim.disk_files import Buffer, DirectoryLock, SlotFiles
from feinwerk.optim.disk_format import HEADER, Commit, Layout, TensorSpec, write_checked

_BUFFERS = 3  # one being read, one being stepped, one being written
_OP = "DiskStates"


class DiskStates:
    """Keep the states of buckets of parameters in files, and at most three buckets in memory.

    Every bucket has two records on disk, so the files take twice the size of the states, reserved
    at once. Generation g + 1 is written beside generation g, and counts from the moment when the
    file `generation` has been replaced: whoever dies at any moment leaves one whole generation.
    A directory belongs to one process (one rank) at a time.

    Tensors from `tensors` are maps of the files. What is read through them stays in this process's
    memory, reclaimable, until `drop` is called or memory is short. They are of the generation that
    counted when they were asked for, and their bytes change two steps later: ask again after a
    step. Writing to them changes the states of the next step, but a directory that was written to
    in this way and not stepped since fails its checksums when it is reopened.

    Args:
        directory: made if it is missing; must hold nothing else.
        buckets: for each bucket, dtype and shape of each tensor by name; the same on reopening.
        identity: whose states these are, for example "rank 0 of 2"; checked on reopening.
        reopen: go on from the last generation in the directory; every record is read and checked.
            Otherwise what earlier processes left there is overwritten.
        fsync: wait until a record is on the disk before it counts, so that a generation also
            survives a power failure. Without it, generations survive the death of the process, and
            the checksums find what a power failure tore.

    Raises:
        StatesInUse: if another process or object has the directory open.
        ForeignStates: if the directory holds other files, or, reopening, another layout.
        IncompleteStates: if there is nothing to reopen.
        CorruptStates: if, reopening, a file is torn, short or changed.
        OffloadError: if the disk is full, read-only or failing.

    Example:
        >>> import tempfile
        >>> bucket = {"exp_avg": (torch.float32, (2, 3))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     states = DiskStates(folder, [bucket, bucket])
        ...     states.fill({"exp_avg": torch.zeros(2, 3)} for _ in range(2))
        ...     with states.step() as buckets:
        ...         for i, tensors in buckets:
        ...             _ = tensors["exp_avg"].add_(i)
        ...     print(states.generation, states.tensors(1)["exp_avg"][0])
        ...     states.close()
        2 tensor([1., 1., 1.])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        buckets: Sequence[Mapping[str, TensorSpec]],
        *,
        identity: str = "",
        reopen: bool = False,
        fsync: bool = True,
    ) -> None:
        """Open or make the directory; see the class."""
        self.directory = Path(directory)
        self.layout = Layout(buckets, identity)
        self.fsync = fsync
        self.generation = 0
        self._commits: list[Commit] = []
        self._order: list[int] | None = None
        self._position = 0
        self._reads: list[Future[dict[str, torch.Tensor]]] = []
        self._writes: list[Future[Commit]] = []
        self._buffers: list[Buffer] = []
        with _disk(f"{self.directory}"):
            self._lock = DirectoryLock(self.directory)
            try:
                self._open(reopen)
            except BaseException:
                self._lock.release()
                raise
        self._reader = ThreadPoolExecutor(1, "feinwerk-read-ahead")
        self._writer = ThreadPoolExecutor(1, "feinwerk-write-behind")

    def _open(self, reopen: bool) -> None:
        layout_file, generation_file = self.directory / "layout", self.directory / "generation"
        if reopen:
            if generation_file.exists():
                self.layout.check(layout_file)
            generation, commits = self.layout.read_commit(generation_file)
            self._files = SlotFiles(self.directory, self.layout, create=False, fsync=self.fsync)
            for bucket, commit in enumerate(commits):
                self._files.verify(bucket, commit, self._buffer(0))
            self.generation, self._commits = generation, commits
        else:
            generation_file.unlink(missing_ok=True)  # first: nothing counts while files change
            write_checked(layout_file, self.layout.text(), self.fsync)
            self._files = SlotFiles(self.directory, self.layout, create=True, fsync=self.fsync)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of both slots."""
        return 2 * self.layout.nbytes

    def _buffer(self, position: int) -> Buffer:
        while len(self._buffers) < min(_BUFFERS, position + 1):
            size = max((r.payload for r in self.layout.records), default=0)
            self._buffers.append(Buffer(HEADER + size))
        return self._buffers[position % _BUFFERS]

    def slot(self, bucket: int) -> int:
        """Which of its two records counts, 0 or 1."""
        self._check_filled()
        return self._commits[bucket].slot

    def tensors(self, bucket: int) -> dict[str, torch.Tensor]:
        """The tensors of a bucket as of the last generation, mapped from its file.

        Raises:
            OffloadError: if nothing has been filled in yet.
        """
        return self._files.tensors(bucket, self.slot(bucket))

    def drop(self) -> None:
        """Take what was read through mapped tensors out of memory; they stay usable."""
        with _disk("a map"):
            self._files.drop()

    def fill(
        self,
        records: Iterable[Mapping[str, torch.Tensor | int]],
        order: Sequence[int] | None = None,
    ) -> None:
        """Make a generation of given states: one record for each bucket, consumed lazily.

        Args:
            records: the tensors of each bucket, or a number for all elements of one; copied before
                the next record is asked for.
            order: the buckets that they are for; default all. The others stay as they are.

        Raises:
            ValueError: if the number of records, a name, dtype or shape is not the layout's.
            OffloadError: if the disk fails; the previous generation counts on.
        """
        self._check_idle()
        order = self._checked(range(len(self.layout.records)) if order is None else order)
        if len(order) < len(self.layout.records):
            self._check_filled()
        self._order, self._position = order, 0
        try:
            for position, record in enumerate(records):
                if position == len(order):
                    _checks.reject(ValueError, _OP, "records", f"be {position}", "more")
                self._wait_for_write(position - _BUFFERS)
                bucket, buffer = order[position], self._buffer(position)
                self._copy(bucket, record, buffer)
                self._put(bucket, buffer)
                del record  # before the next one is made
        except BaseException:
            self.abandon()
            raise
        self.commit()

    def _copy(self, bucket: int, record: Mapping[str, torch.Tensor | int], buffer: Buffer) -> None:
        places = self.layout.records[bucket].places
        if set(record) != set(places):
            rule = f"have the tensors {list(places)}"
            _checks.reject(ValueError, _OP, f"record of bucket {bucket}", rule, list(record))
        for name, target in buffer.tensors(self.layout, bucket).items():
            given = record[name]
            if isinstance(given, int):
                target.fill_(given)
                continue
            if given.dtype != target.dtype or given.shape != target.shape:
                rule = f"be {target.dtype} of shape {tuple(target.shape)}"
                got = f"{given.dtype} of shape {tuple(given.shape)}"
                _checks.reject(ValueError, _OP, f"{name!r} of bucket {bucket}", rule, got)
            target.copy_(given)

    @contextlib.contextmanager
    def step(
        self, order: Sequence[int] | None = None
    ) -> Iterator[Iterator[tuple[int, dict[str, torch.Tensor]]]]:
        """Go through buckets, each in memory once; what is changed in place is the next generation.

        Leaving the block commits; an exception, or leaving before the last bucket, abandons.

        Args:
            order: the buckets to step, each at most once; default all. The others stay as they are.

        Raises:
            OffloadError: if the disk fails; the previous generation counts on.
        """
        self.begin(range(len(self.layout.records)) if order is None else order)
        try:
            yield self._walk()
        except BaseException:
            self.abandon()
            raise
        if self._order is not None and self._position < len(self._order):
            self.abandon()
        else:
            self.commit()

    def _walk(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for bucket in list(self._order or ()):
            yield bucket, self.take(bucket)
            self.put(bucket)

    def begin(self, order: Iterable[int]) -> None:
        """Start a generation that changes these buckets, in this order, and read the first."""
        self._check_idle()
        self._check_filled()
        order = self._checked(order)
        self._files.check_sizes()
        self._order, self._position = order, 0
        self._read_ahead(0)

    def take(self, bucket: int) -> dict[str, torch.Tensor]:
        """The tensors of the next bucket, to be changed in place; the one after it is read."""
        self._check_next(bucket)
        # The buffer of the next read is the one whose write was handed over two buckets ago.
        self._wait_for_write(self._position - 2)
        tensors = self._reads[self._position].result()
        self._read_ahead(self._position + 1)
        return tensors

    def put(self, bucket: int) -> None:
        """Hand the bucket that was taken to the writing thread."""
        self._check_next(bucket)
        self._put(bucket, self._buffer(self._position))

    def commit(self) -> None:
        """Wait for the last write, and make the new generation the one that counts.

        Raises:
            OffloadError: if a write failed, or buckets are missing; the previous one counts on.
        """
        order = self._order
        if order is None or self._position != len(order):
            self.abandon()
            missing = 0 if order is None else len(order) - self._position
            raise OffloadError(f"{_OP}: a generation must have all buckets, got {missing} missing")
        try:
            commits = list(self._commits) or [Commit(0, 0, 0)] * len(self.layout.records)
            for bucket, write in zip(order, self._writes, strict=True):
                commits[bucket] = write.result()
            with _disk("the generation file"):
                text = self.layout.commit_text(self.generation + 1, commits)
                write_checked(self.directory / "generation", text, self.fsync)
        except BaseException:
            self.abandon()
            raise
        self.generation, self._commits = self.generation + 1, commits
        self._order, self._reads, self._writes = None, [], []

    def abandon(self) -> None:
        """Forget the generation under way; the previous one counts on."""
        futures: list[Future[Any]] = [*self._reads, *self._writes]
        wait(futures)
        self._order, self._reads, self._writes = None, [], []

    def close(self) -> None:
        """Stop the threads and let the directory go; mapped tensors stay usable."""
        self.abandon()
        self._reader.shutdown()
        self._writer.shutdown()
        self._files.close()
        self._lock.release()

    def _put(self, bucket: int, buffer: Buffer) -> None:
        slot = 1 - self._commits[bucket].slot if self._commits else 0
        self._writes.append(
            self._writer.submit(self._write, bucket, slot, self.generation + 1, buffer)
        )
        self._position += 1

    def _write(self, bucket: int, slot: int, generation: int, buffer: Buffer) -> Commit:
        with _disk(f"bucket {bucket}"):
            return self._files.write(bucket, slot, generation, buffer)

    def _read_ahead(self, position: int) -> None:
        assert self._order is not None
        if position < len(self._order):
            bucket, buffer = self._order[position], self._buffer(position)
            self._reads.append(self._reader.submit(self._read, bucket, buffer))

    def _read(self, bucket: int, buffer: Buffer) -> dict[str, torch.Tensor]:
        with _disk(f"bucket {bucket}"):
            self._files.read(bucket, self._commits[bucket].slot, buffer)
        return buffer.tensors(self.layout, bucket)

    def _wait_for_write(self, position: int) -> None:
        if position >= 0:
            self._writes[position].result()

    def _checked(self, order: Iterable[int]) -> list[int]:
        order, known = list(order), range(len(self.layout.records))
        if len(set(order)) != len(order) or not all(bucket in known for bucket in order):
            _checks.reject(ValueError, _OP, "order", f"name buckets below {len(known)} once", order)
        return order

    def _check_idle(self) -> None:
        if self._order is not None:
            raise OffloadError(f"{_OP}: a generation must be ended before the next, got two")

    def _check_filled(self) -> None:
        if self.generation == 0:
            raise OffloadError(f"{_OP}: states must be filled before they are used, got none")

    def _check_next(self, bucket: int) -> None:
        if self._order is None or self._position >= len(self._order):
            _checks.reject(ValueError, _OP, "bucket", "belong to a generation under way", bucket)
        if bucket != self._order[self._position]:
            rule = f"be the next of the order, {self._order[self._position]}"
            _checks.reject(ValueError, _OP, "bucket", rule, bucket)


@contextlib.contextmanager
def _disk(what: str) -> Iterator[None]:
    """Say which record failed, in the type that callers catch."""
    try:
        yield
    except OSError as error:
        raise OffloadError(f"{_OP}: {what} must be readable and writable, got {error}") from error
