"""What states on disk refuse: changed, short and foreign files, a second owner, too little room."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk.optim import disk_files
from feinwerk.optim.disk_errors import (
    CorruptStates,
    ForeignStates,
    IncompleteStates,
    OffloadError,
    StatesInUse,
)
from feinwerk.optim.disk_format import ALIGNMENT, HEADER
from feinwerk.optim.disk_states import DiskStates
from tests.optim.disk_records import BUCKETS, change, content, records, reopened, same
from tests.optim.forked import run_forked


@pytest.fixture
def states(tmp_path: Path) -> Iterator[DiskStates]:
    made = DiskStates(tmp_path / "states", BUCKETS, identity="rank 0 of 1")
    made.fill(records(0))
    yield made
    made.close()


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def test_a_flipped_bit_is_found(states: DiskStates) -> None:
    change(states, lambda tensor: tensor.add_(1), [2])
    states.close()
    # Bucket 2 counts in slot b, the others in slot a.
    third = states.layout.records[2].offset
    for slot, offset, bucket in (
        ("slot-a", 3, 0), ("slot-a", 70, 0), ("slot-a", HEADER, 0), ("slot-a", HEADER + 1000, 0),
        ("slot-b", third + 30, 2), ("slot-b", third + HEADER + 279_999, 2),
    ):  # fmt: skip
        file = states.directory / slot
        flip(file, offset)
        with pytest.raises(CorruptStates) as caught:
            reopened(states.directory)
        assert (caught.value.file, caught.value.bucket) == (file, bucket)
        flip(file, offset)
    for slot, offset in (("slot-b", HEADER), ("slot-a", third + HEADER)):  # does not count
        flip(states.directory / slot, offset)
    reopened(states.directory).close()


def test_any_flipped_bit_of_the_small_files_is_found(states: DiskStates) -> None:
    states.close()
    for name in ("generation", "layout"):
        file = states.directory / name
        for offset in range(0, file.stat().st_size - 1, 7):
            flip(file, offset)
            with pytest.raises(CorruptStates, match=name):
                reopened(states.directory)
            flip(file, offset)
    reopened(states.directory).close()


@pytest.mark.parametrize("name", ["slot-a", "slot-b", "layout", "generation"])
@pytest.mark.parametrize("how", ["short", "empty", "missing", "long"])
def test_short_and_missing_files_are_refused(states: DiskStates, name: str, how: str) -> None:
    states.close()
    file = states.directory / name
    if how == "missing":
        file.unlink()
    elif how == "long":
        file.write_bytes(file.read_bytes() + bytes(4096))
    else:
        os.truncate(file, 0 if how == "empty" else file.stat().st_size // 2)
    error = IncompleteStates if (name, how) == ("generation", "missing") else CorruptStates
    with pytest.raises(error, match=name):
        reopened(states.directory)


def test_a_file_cut_short_during_training_is_an_error_and_no_crash(states: DiskStates) -> None:
    os.truncate(states.directory / "slot-a", ALIGNMENT)
    with pytest.raises(CorruptStates, match="slot-a"):
        states.begin([0])


def test_a_record_of_another_generation_is_refused(states: DiskStates, tmp_path: Path) -> None:
    shutil.copytree(states.directory, tmp_path / "old")
    for _ in range(2):
        change(states, lambda tensor: tensor)
    states.close()
    shutil.copy(tmp_path / "old" / "slot-a", states.directory / "slot-a")
    with pytest.raises(CorruptStates, match="must be generation 3 in slot 0, got generation 1"):
        reopened(states.directory)
    os.replace(states.directory / "slot-b", states.directory / "slot-a")
    shutil.copy(tmp_path / "old" / "slot-a", states.directory / "slot-b")
    with pytest.raises(CorruptStates, match="must be generation 3 in slot 0, got generation 2"):
        reopened(states.directory)


def test_another_layout_is_refused_naming_the_first_difference(
    states: DiskStates, tmp_path: Path
) -> None:
    states.close()
    other: list[Any] = [dict(bucket) for bucket in BUCKETS]
    other[1]["1.exp_avg"] = (torch.float32, (3, 7))
    for changes, message in (
        ({"identity": "rank 1 of 2"}, "be of 'rank 1 of 2', got 'rank 0 of 1'"),
        ({"buckets": BUCKETS[:4]}, "have 4 buckets, got 5"),
        ({"buckets": BUCKETS[::-1]}, r"have tensors \['4.step'\] in bucket 0"),
        ({"buckets": other}, "'1.exp_avg' of bucket 1, got torch.bfloat16"),
    ):
        with pytest.raises(ForeignStates, match=message):
            reopened(states.directory, **changes)
    theirs = DiskStates(tmp_path / "theirs", other, identity="rank 0 of 1")
    theirs.fill([{n: torch.zeros(s, dtype=d) for n, (d, s) in bucket.items()} for bucket in other])
    theirs.close()
    for name in ("slot-a", "generation"):
        shutil.copy(states.directory / name, tmp_path / name)
        shutil.copy(tmp_path / "theirs" / name, states.directory / name)
        with pytest.raises(ForeignStates, match=name):
            reopened(states.directory)
        shutil.copy(tmp_path / name, states.directory / name)
    reopened(states.directory).close()


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for reopen in (False, True):
        with pytest.raises(ForeignStates, match=r"thesis\.tex"):
            DiskStates(tmp_path, BUCKETS, reopen=reopen)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def _try_to_open(directory: str) -> str:
    # A forked child has its parent's memory: what is open in the parent is no business of its own.
    disk_files._open_here.clear()
    try:
        DiskStates(directory, BUCKETS)
    except StatesInUse as error:
        return str(error)
    return "opened"


def test_one_owner_at_a_time(states: DiskStates) -> None:
    with pytest.raises(StatesInUse, match="another object of this process"):
        DiskStates(states.directory, BUCKETS)
    assert f"got process {os.getpid()} on" in run_forked(_try_to_open, str(states.directory))
    assert same(content(states), records(0))
    states.close()
    assert run_forked(_try_to_open, str(states.directory)) == "opened"


def test_an_object_that_is_forgotten_lets_go(tmp_path: Path) -> None:
    states = DiskStates(tmp_path / "states", BUCKETS)
    states.fill(records(0))
    held = states.tensors(2)["3.exp_avg_sq"]
    del states
    again = DiskStates(tmp_path / "states", BUCKETS)
    assert held.shape == (70000,)
    again.close()


def test_rejections(states: DiskStates, tmp_path: Path) -> None:
    good = records(1)
    for bad, message in (
        (good[:4], "all buckets, got 1 missing"),
        ([*good, {}], r"records must be 5, got more"),
        ([{}, *good[1:]], r"record of bucket 0 must have the tensors \['0.step'"),
        ([*good[:2], {"3.exp_avg_sq": torch.zeros(3)}, {}, good[4]], "shape \\(70000,\\), got"),
        ([*good[:4], {"4.step": torch.zeros((), dtype=torch.int16)}], "got torch.int16 of shape"),
    ):
        with pytest.raises((ValueError, OffloadError), match=message):
            states.fill(bad)
        assert states.generation == 1
    for order in ([5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="order must name buckets below 5 once, got"):
            states.begin(order)
    states.begin([1, 0])
    with pytest.raises(OffloadError, match="must be ended before the next"):
        states.begin([2])
    with pytest.raises(ValueError, match="bucket must be the next of the order, 1, got 0"):
        states.take(0)
    states.take(1)
    states.put(1)
    with pytest.raises(OffloadError, match="all buckets, got 1 missing"):
        states.commit()
    with pytest.raises(ValueError, match="belong to a generation under way, got 0"):
        states.take(0)
    assert same(content(states), records(0))


def _no_room(directory: str) -> tuple[str, int | None, int]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ALIGNMENT, ALIGNMENT))
    try:
        DiskStates(directory, BUCKETS)
    except OffloadError as error:
        cause = error.__cause__
        taken = sum(p.stat().st_blocks for p in Path(directory).iterdir() if p.name[:4] == "slot")
        return str(error), getattr(cause, "errno", None), taken
    return "", None, 0


def test_too_little_room_is_an_error_at_the_start_and_given_back(tmp_path: Path) -> None:
    message, number, taken = run_forked(_no_room, str(tmp_path / "states"))
    assert message.startswith("DiskStates: ")
    assert number == errno.EFBIG
    assert taken == 0


def test_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match="Not a directory"):
        DiskStates(tmp_path / "file" / "states", BUCKETS)


def test_errors_travel_between_processes(tmp_path: Path) -> None:
    for error in (
        StatesInUse(tmp_path, "process 1"),
        IncompleteStates(tmp_path / "generation"),
        ForeignStates(tmp_path, "be ours", 3),
        CorruptStates(tmp_path, 4, "be whole", "half"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.__dict__) == (str(error), error.__dict__)
