"""A process that dies at any system call leaves one whole generation, never parts of two."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk.optim import disk_files
from feinwerk.optim.disk_errors import IncompleteStates, OffloadError, StatesInUse
from feinwerk.optim.disk_states import DiskStates
from tests.optim.disk_records import BUCKETS, change, content, records, reopened, same
from tests.optim.forked import fork, run_forked, wait_for

CALLS = (
    "open", "close", "write", "pwrite", "pwritev", "preadv", "ftruncate", "posix_fallocate",
    "fsync", "fdatasync", "replace", "unlink", "mkdir", "posix_fadvise",
)  # fmt: skip
STEPS = 3


def after(steps: int) -> list[dict[str, torch.Tensor]]:
    """The states of generation 1 + `steps`."""
    made = records(0)
    for _ in range(steps):
        for record in made:
            for tensor in record.values():
                tensor.add_(1)
    return made


def train(directory: str, fsync: bool = True) -> None:
    states = DiskStates(directory, BUCKETS, identity="rank 0 of 1", fsync=fsync)
    states.fill(records(0))
    for _ in range(STEPS):
        change(states, lambda tensor: tensor.add_(1))
    states.close()


def _die_at(directory: str, number: int, before: bool) -> int:
    """Train and die at a system call; the number of calls where there are fewer."""
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count
            if mine == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            if mine == number and real.__name__ in ("write", "pwritev"):
                # A write that is cut off: half of it is in the file.
                whole = args[1][0] if real.__name__ == "pwritev" else args[1]
                half = memoryview(whole)[: len(whole) // 2]
                real(args[0], [half] if real.__name__ == "pwritev" else half, *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if mine == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    train(directory)
    return count


def check_what_is_left(directory: Path) -> int:
    """The generation that a reopening process finds, 0 for none; anything mixed fails."""
    try:
        states = reopened(directory)
    except IncompleteStates:
        return 0
    found = states.generation
    assert same(content(states), after(found - 1)), f"generation {found} is not itself"
    # And it goes on from there.
    change(states, lambda tensor: tensor.add_(1))
    assert same(content(states), after(found))
    states.close()
    return found


def kill_at(directory: Path, number: int, before: bool) -> int:
    child, pipe = fork(_die_at, str(directory), number, before)
    os.close(pipe)
    status = wait_for(child)
    assert os.WIFSIGNALED(status), f"call {number}: wait status {status}"
    return check_what_is_left(directory)


def every_point(tmp_path: Path, stride: int) -> list[int]:
    count = run_forked(_die_at, str(tmp_path / "count"), 0, True)
    assert count > 60
    left = []
    for number in range(1, count + 1, stride):
        for before in (True, False):
            left.append(kill_at(tmp_path / f"states-{number}-{before}", number, before))
    return left


def test_killed_at_some_system_calls(tmp_path: Path) -> None:
    left = every_point(tmp_path, stride=5)
    assert set(left) == {0, 1, 2, 3, 4}
    assert left == sorted(left), "a later death never leaves an older generation"


@pytest.mark.full
def test_killed_at_every_system_call(tmp_path: Path) -> None:
    left = every_point(tmp_path, stride=1)
    assert set(left) == {0, 1, 2, 3, 4}


def _train_for_ever(directory: str) -> None:
    states = DiskStates(directory, BUCKETS, identity="rank 0 of 1", fsync=False)
    states.fill(records(0))
    for _ in range(100_000):
        change(states, lambda tensor: tensor.add_(1))


def kill_at_random(directory: Path, seconds: float) -> int:
    child, pipe = fork(_train_for_ever, str(directory))
    os.close(pipe)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    if not (directory / "generation").exists():
        return 0
    states = reopened(directory)
    found = states.generation
    assert same(content(states), after(found - 1))
    states.close()
    return found


@pytest.mark.parametrize(
    "repeats", [4, pytest.param(40, marks=pytest.mark.full)], ids=["few", "many"]
)
def test_killed_at_any_moment(tmp_path: Path, repeats: int) -> None:
    draw = random.Random(0)
    found = [kill_at_random(tmp_path / str(i), 0.05 + draw.random() * 0.4) for i in range(repeats)]
    assert max(found) > 2


def test_restarting_over_what_a_killed_process_left(tmp_path: Path) -> None:
    kill_at(tmp_path / "states", 70, before=False)
    states = DiskStates(tmp_path / "states", BUCKETS, identity="rank 0 of 1")
    with pytest.raises(OffloadError, match="filled"):
        states.tensors(0)
    states.fill(after(5))
    states.close()
    again = reopened(tmp_path / "states")
    assert (again.generation, same(content(again), after(5))) == (1, True)
    again.close()


def _own_and_leave_an_orphan(directory: str) -> None:
    states = DiskStates(directory, BUCKETS)
    orphan, _ = fork(time.sleep, 60)  # as a worker of a DataLoader outlives its killed parent
    Path(directory).with_name("orphan").write_text(str(orphan))
    assert states.generation == 0


def test_an_orphan_of_the_owner_does_not_hold_the_directory(tmp_path: Path) -> None:
    child, pipe = fork(_own_and_leave_an_orphan, str(tmp_path / "states"))
    assert wait_for(child) == 0
    os.close(pipe)
    orphan = int((tmp_path / "orphan").read_text())
    try:
        os.kill(orphan, 0)
        DiskStates(tmp_path / "states", BUCKETS).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_stopped_owner_holds_the_directory_and_a_dead_one_does_not(tmp_path: Path) -> None:
    directory = tmp_path / "states"
    child, pipe = fork(_train_for_ever, str(directory))
    os.close(pipe)
    end = time.monotonic() + 30
    while not (directory / "generation").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    disk_files._open_here.clear()
    with pytest.raises(StatesInUse, match=f"got process {child} on"):
        DiskStates(directory, BUCKETS)
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    DiskStates(directory, BUCKETS).close()
