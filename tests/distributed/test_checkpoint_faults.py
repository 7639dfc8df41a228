"""A save that dies, or fails, at any file-system call leaves one whole checkpoint or the other.

The calls are met where Python makes them: the audit events of opening, renaming, making and
removing, and `os.write`, `os.fsync` and `os.close`, which all writing goes through.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feinwerk.distributed import (
    CheckpointError,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)
from tests.distributed.checkpoint_cases import digest, tiny_model, tiny_optimizer, train
from tests.optim.forked import fork, run_forked, wait_for

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
STALE = ("step-0.tmp-0123456789abcdef", "step-0.old-0123456789abcdef")


def intercept(directory: str, at_call: Callable[[str, str], None]) -> None:
    """Call `at_call(name, what)` before every file-system call of this process from here on."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(args[0]).startswith(directory):
            at_call(event, str(args[0]))
        elif event in ("os.remove", "os.rmdir") and not os.path.isabs(str(args[0])):
            at_call(event, str(args[0]))  # shutil.rmtree names files relative to a descriptor

    sys.addaudithook(hook)
    for name in ("write", "fsync", "close"):
        setattr(os, name, _noted(getattr(os, name), at_call))


def _noted(real: Callable[..., Any], at_call: Callable[[str, str], None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            at_call(real.__name__, str(args[0]))
        except _HalfWritten:
            if real.__name__ == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        except OSError:
            if real.__name__ == "close":
                real(*args)  # close reports an error, and the descriptor is gone all the same
            raise
        return real(*args)

    return call


class _HalfWritten(Exception):
    """Die after half of a write."""


class Directory:
    """A directory with step 1 and what older crashes left, and the model on its way to step 2."""

    def __init__(self, path: Path) -> None:
        self.path = path / "checkpoints"
        self.model = tiny_model()
        self.optimizer = tiny_optimizer(self.model)
        train(self.model, self.optimizer, 0, 1)
        save_checkpoint(self.path, 1, self.model, self.optimizer, extra="one")
        for name in STALE:
            (self.path / name).mkdir()
            (self.path / name / "__0_0.distcp").write_bytes(b"left behind")
        self.digests = {1: digest(self.model, self.optimizer)}
        train(self.model, self.optimizer, 1, 1)
        self.digests[2] = digest(self.model, self.optimizer)

    def save(self, path: Path) -> None:
        save_checkpoint(path, 2, self.model, self.optimizer, keep=1, extra="two")

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.path, self.path.with_name(name)))

    def check(self, path: Path) -> int:
        """The one step that load_latest finds, after looking at every bit of it."""
        model = tiny_model()
        optimizer = tiny_optimizer(model)
        train(model, optimizer, 7, 1)  # something else
        loaded = load_latest(path, model, optimizer)
        assert loaded is not None
        assert digest(model, optimizer) == self.digests[loaded.step]
        assert loaded.extra == {1: "one", 2: "two"}[loaded.step]
        for checkpoint in list_checkpoints(path):
            assert verify_checkpoint(checkpoint.path) == []
        # And training goes on: the next save works, and takes away what was left.
        train(model, optimizer, loaded.step, 1)
        save_checkpoint(path, 3, model, optimizer, keep=1)
        assert os.listdir(path) == ["step-3"]
        return loaded.step


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


def count_calls(directory: Directory) -> list[str]:
    """The names of all calls of one save."""
    path = directory.copy("count")

    def save() -> list[str]:
        calls: list[str] = []
        intercept(str(path), lambda name, what: calls.append(name))
        directory.save(path)
        return calls

    calls = run_forked(save)
    assert {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"} <= set(calls)
    assert {"write", "fsync", "close"} <= set(calls)
    return list(calls)


def test_killed_at_every_file_system_call(directory: Directory) -> None:
    calls = count_calls(directory)
    points = [(number, False) for number in range(len(calls) + 1)]
    points += [(number, True) for number, name in enumerate(calls) if name == "write"]
    found = {}
    for number, half in points:
        path = directory.copy(f"killed-{number}-{half}")
        count = 0

        def die(name: str, what: str, number: int = number, half: bool = half) -> None:
            nonlocal count
            if count == number:
                if half:
                    raise _HalfWritten
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def save(path: Path = path, die: Callable[[str, str], None] = die) -> None:
            intercept(str(path), die)
            directory.save(path)

        child, pipe = fork(save)
        os.close(pipe)
        status = wait_for(child)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert died == (number < len(calls)), f"call {number}: wait status {status}"
        found[number, half] = directory.check(path)
        shutil.rmtree(path)
    steps = [found[number, False] for number in range(len(calls) + 1)]
    # Step 1 up to the rename, step 2 from there on; the calls after it are the removals.
    renamed = calls.index("os.rename", calls.index("os.rename") + 1)  # the first is .metadata's
    assert steps == [1] * (renamed + 1) + [2] * (len(calls) - renamed)
    assert len(calls) - renamed > 5


class _Failing:
    """A save in which one call fails, or all from one on."""

    def __init__(self, code: int, number: int, sticky: bool) -> None:
        self.code, self.number, self.sticky = code, number, sticky
        self.count = 0
        self.on = True

    def __call__(self, name: str, what: str) -> None:
        here = self.count
        self.count += 1
        if self.on and (here == self.number or (self.sticky and here > self.number)):
            raise OSError(self.code, os.strerror(self.code), what)


def save_with_a_failure(
    directory: Directory, path: Path, code: int, number: int, sticky: bool
) -> str:
    """In a child: what came of the save, after checking that everything can go on."""
    failing = _Failing(code, number, sticky)
    intercept(str(path), failing)
    before = digest(directory.model, directory.optimizer)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failure = None
        try:
            directory.save(path)
        except CheckpointError as error:
            failure = error
    failing.on = False
    outcome = "failed" if failure else "warned" if warned else "saved"
    assert failure is None or os.strerror(code) in str(failure)
    assert digest(directory.model, directory.optimizer) == before
    steps = [checkpoint.step for checkpoint in list_checkpoints(path)]
    if outcome == "failed":
        assert steps == [1]
        if not sticky:
            left = {entry for entry in os.listdir(path) if "step-2" in entry}
            assert not left, "a failed save takes its half checkpoint away"
        train(directory.model, directory.optimizer, 2, 1)  # training goes on ...
        save_checkpoint(path, 2, directory.model, directory.optimizer, keep=1)  # ... and saves
        assert os.listdir(path) == ["step-2"]
        assert verify_checkpoint(path / "step-2") == []
    else:
        assert steps[-1] == 2
        directory.check(path)
    return outcome


@pytest.mark.parametrize(
    ("code", "sticky"),
    [(errno.ENOSPC, False), (errno.EIO, True)],
    ids=["one call without space", "a disk that fails from then on"],
)
def test_an_error_at_every_file_system_call(directory: Directory, code: int, sticky: bool) -> None:
    calls = count_calls(directory)
    outcomes = []
    for number in range(len(calls) + 1):
        path = directory.copy(f"failed-{number}")
        outcomes.append(run_forked(save_with_a_failure, directory, path, code, number, sticky))
        shutil.rmtree(path)
    assert outcomes[-1] == "saved"
    # Up to the sync after the rename a failure is an error; later it is about old checkpoints.
    last = max(number for number, outcome in enumerate(outcomes) if outcome == "failed")
    renamed = calls.index("os.rename", calls.index("os.rename") + 1)
    # On a dead disk the rename cannot be taken back either: the checkpoint stands, with a warning.
    assert last == renamed if sticky else renamed < last < renamed + 5
    assert set(outcomes[: renamed + 1]) == {"failed"}
    assert "warned" in outcomes[last:]


def test_a_disk_quota(directory: Directory) -> None:
    """The kernel itself refuses: no file may have more than 2,000 bytes."""

    def save() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="File too large"):
            directory.save(directory.path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return ", ".join(sorted(os.listdir(directory.path)))

    assert run_forked(save) == ", ".join(sorted(["step-1", *STALE]))
    assert directory.check(directory.path) == 1


@pytest.mark.parametrize("place", ["/proc/feinwerk", "file/checkpoints"])
def test_a_directory_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no directory")
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    with pytest.raises(CheckpointError, match=r"save_checkpoint: create failed: \w*Error"):
        save_checkpoint(tmp_path / place, 1, model, optimizer)


def test_everything_is_synced_before_it_counts(directory: Directory) -> None:
    """After a power cut only what was synced is there: the order of the calls decides."""
    path = directory.copy("traced")

    def save() -> list[tuple[str, str]]:
        calls: list[tuple[str, str]] = []

        def note(name: str, what: str) -> None:
            if what.isdigit():  # a descriptor: say which file it is
                what = os.readlink(f"/proc/self/fd/{what}")
            calls.append((name, what))

        intercept(str(path), note)
        directory.save(path)
        return calls

    calls = run_forked(save)
    temporary = next(what for name, what in calls if name == "os.mkdir")
    renamed = calls.index(("os.rename", temporary))
    for file in ("__0_0.distcp", ".metadata", "manifest.json"):
        synced = max(i for i, call in enumerate(calls) if call == ("fsync", f"{temporary}/{file}"))
        writes = [i for i, call in enumerate(calls) if call == ("write", f"{temporary}/{file}")]
        assert synced < renamed
        assert not writes or max(writes) < synced
        # The name of the file is synced as well, after it was made.
        assert ("fsync", temporary) in calls[synced:renamed]
    seals = calls.index(("open", f"{temporary}/manifest.json"))
    others = [i for i, (_, what) in enumerate(calls) if what.startswith(f"{temporary}/")]
    assert all(i < seals or calls[i][1].endswith("manifest.json") for i in others)
    after = calls[renamed:]
    assert ("fsync", str(path)) in after
    removed = next(i for i, (name, _) in enumerate(after) if name == "os.remove")
    assert after.index(("fsync", str(path))) < removed
