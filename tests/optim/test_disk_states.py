"""States on disk: what a step changes, what counts when, how much is in memory, failing disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk.optim import disk_files
from feinwerk.optim.disk_errors import IncompleteStates, OffloadError
from feinwerk.optim.disk_format import ALIGNMENT
from feinwerk.optim.disk_states import DiskStates
from tests.optim.disk_records import BUCKETS, change, content, records, reopened, same


@pytest.fixture
def states(tmp_path: Path) -> Iterator[DiskStates]:
    made = DiskStates(tmp_path / "states", BUCKETS, identity="rank 0 of 1")
    made.fill(records(0))
    yield made
    made.close()


def test_a_step_changes_every_bucket_and_the_next_process_sees_it(states: DiskStates) -> None:
    expected = records(0)
    assert same(content(states), expected)
    for factor in (1, 2, 3):
        with states.step() as buckets:
            for i, tensors in buckets:
                for name, tensor in tensors.items():
                    tensor.add_(factor)
                    expected[i][name].add_(factor)
        assert same(content(states), expected)
    assert states.generation == 4
    states.close()
    again = DiskStates(states.directory, BUCKETS, identity="rank 0 of 1", reopen=True)
    assert again.generation == 4
    assert same(content(again), expected)
    again.close()


def test_buckets_that_a_step_leaves_out_stay(states: DiskStates) -> None:
    expected = records(0)
    for order in ([4, 2], [2], [], [0, 4, 1, 2, 3]):
        with states.step(order) as buckets:
            seen = []
            for i, tensors in buckets:
                seen.append(i)
                for name, tensor in tensors.items():
                    tensor.mul_(2)
                    expected[i][name].mul_(2)
        assert seen == order
        assert same(content(states), expected)
    states.close()
    again = DiskStates(states.directory, BUCKETS, identity="rank 0 of 1", reopen=True)
    assert same(content(again), expected)
    again.close()


def test_an_exception_or_an_early_end_leaves_the_generation(states: DiskStates) -> None:

    def failing(tensor: torch.Tensor) -> None:
        tensor.zero_()
        if tensor.dtype is torch.int16:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change(states, failing)
    with states.step() as buckets:
        _, tensors = next(buckets)
        tensors["0.step"].fill_(-1)
    assert states.generation == 1
    assert same(content(states), records(0))
    change(states, lambda tensor: tensor.add_(1))
    assert states.generation == 2
    assert torch.equal(content(states)[2]["3.exp_avg_sq"], records(0)[2]["3.exp_avg_sq"] + 1)


def test_writing_to_mapped_tensors_reaches_the_next_step(states: DiskStates) -> None:
    states.tensors(2)["3.exp_avg_sq"].fill_(7)
    with states.step([2]) as buckets:
        for _, tensors in buckets:
            assert bool((tensors["3.exp_avg_sq"] == 7).all())
            tensors["3.exp_avg_sq"].add_(1)
    assert bool((states.tensors(2)["3.exp_avg_sq"] == 8).all())


@pytest.mark.parametrize("slow", ["read", "write", "both"])
def test_slow_disks_change_nothing(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A buffer that were used again too early would hold another bucket's numbers.
    flying, most = [0], [0]

    def delayed(name: str) -> Any:
        real = getattr(disk_files.SlotFiles, name)

        def call(self: Any, *args: Any) -> Any:
            if slow in (name, "both"):
                time.sleep(0.01)
            return real(self, *args)

        return call

    for name in ("read", "write"):
        monkeypatch.setattr(disk_files.SlotFiles, name, delayed(name))
    buckets = [{"exp_avg": (torch.float32, (1000,))} for _ in range(9)]
    states = DiskStates(tmp_path / "states", buckets, fsync=False)
    states.fill({"exp_avg": torch.full((1000,), float(i))} for i in range(9))
    for step in range(1, 4):
        with states.step() as walk:
            for i, tensors in walk:
                assert bool((tensors["exp_avg"] == i * 10 ** (step - 1)).all())
                tensors["exp_avg"].mul_(10)
                flying[0] = len(states._reads) - sum(w.done() for w in states._writes)
                most[0] = max(most[0], flying[0])
    assert 2 <= most[0] <= 3
    assert len(states._buffers) == 3
    assert all(bool((states.tensors(i)["exp_avg"] == i * 1000).all()) for i in range(9))
    states.close()


MEMORY = """
import os, sys, torch
from feinwerk.optim.disk_states import DiskStates

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def run(directory, count, numel):
    given, most = torch.zeros(numel), 0
    start = resident()

    def records():
        for i in range(count):
            yield {"exp_avg": given.fill_(i)}

    states = DiskStates(directory, [{"exp_avg": (torch.float32, (numel,))}] * count)
    states.fill(records())
    for _ in range(2):
        with states.step() as walk:
            for _, tensors in walk:
                tensors["exp_avg"].add_(1)
                most = max(most, resident() - start)
    held = [states.tensors(i)["exp_avg"] for i in range(count)]
    assert sum(float(t.sum()) for t in held) == sum((i + 2) * numel for i in range(count))
    mapped = resident() - start
    states.drop()
    dropped = resident() - start
    assert float(held[5][-1]) == 7
    states.close()
    return most, mapped, dropped

torch.set_num_threads(1)
run(sys.argv[1] + "-warm", 6, 100)
print(*run(sys.argv[1], 24, int(sys.argv[2]) // 4))
"""


def test_at_most_three_buckets_are_in_memory(tmp_path: Path) -> None:
    nbytes = 4 << 20
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "states"), str(nbytes)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    most, mapped, dropped = map(int, run.stdout.split())
    slack = nbytes // 2  # page tables, the interpreter
    assert 2 * nbytes < most <= 3 * nbytes + slack, f"{most / nbytes:.2f} buckets of 24"
    assert dropped <= 3 * nbytes + slack, f"{dropped / nbytes:.2f} buckets of 24"
    assert mapped >= 24 * nbytes, "what is read through maps shows in this measure"


def test_twice_the_size_is_reserved_at_once(states: DiskStates) -> None:
    on_disk = sum((states.directory / slot).stat().st_blocks * 512 for slot in ("slot-a", "slot-b"))
    assert states.nbytes <= on_disk <= states.nbytes + ALIGNMENT


def test_a_new_object_starts_anew(states: DiskStates) -> None:
    states.close()
    anew = DiskStates(states.directory, BUCKETS[:2])
    with pytest.raises(OffloadError, match="must be filled before they are used"):
        anew.tensors(0)
    anew.close()
    with pytest.raises(IncompleteStates, match="complete generation"):
        DiskStates(states.directory, BUCKETS[:2], reopen=True)


@pytest.mark.parametrize("buckets", [[], [{}], [{"a": (torch.float32, (0, 4))}]], ids=str)
def test_nothing_to_keep(buckets: list[Any], tmp_path: Path) -> None:
    states = DiskStates(tmp_path / "states", buckets)
    states.fill({name: torch.zeros(0, 4) for name in bucket} for bucket in buckets)
    with states.step() as walk:
        assert len(list(walk)) == len(buckets)
    states.close()
    DiskStates(tmp_path / "states", buckets, reopen=True).close()


@pytest.mark.parametrize("name", ["preadv", "pwritev", "replace", "fsync"])
def test_a_failing_disk_is_an_error_and_training_goes_on(
    states: DiskStates, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if name in ("replace", "fsync") or calls[0] == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(OffloadError, match="Input/output error") as caught:
        change(states, torch.Tensor.zero_)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.setattr(os, name, real)
    assert states.generation == 1
    assert same(content(states), records(0))
    change(states, torch.Tensor.zero_)
    states.close()
    again = reopened(states.directory)
    assert again.generation == 2
    assert all(not tensor.any() for record in content(again) for tensor in record.values())
    again.close()
