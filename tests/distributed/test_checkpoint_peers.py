"""One of two ranks fails, dies, stops, or saves something else: the other one is told, in time."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from feinwerk.distributed import (
    CheckpointError,
    CorruptShard,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)
from feinwerk.optim.errors import Disagreement, PeerFailure, PhaseTimeout
from tests.distributed.checkpoint_cases import digest, run
from tests.distributed.checkpoint_engines import build, load_one, save_one, train
from tests.optim.fault_ranks import die, run_to_the_end, stop

# (rank, call, file): before which call on which file a rank meets its fate.
POINTS = {
    "before its file": (1, "open", "__1_0.distcp"),
    "in its write": (1, "write", "__1_0.distcp"),
    "before its sync": (1, "fsync", "__1_0.distcp"),
    "after its sync": (1, "close", "__1_0.distcp"),
    "before the manifest": (0, "open", "manifest.json"),
    "before the rename": (0, "rename", "step-3"),
    "after the rename": (0, "fsync", "checkpoints"),
    "in the removal": (0, "rename", "step-2"),
}


def meet(point: str, rank: int, fate: Callable[[], Any]) -> None:
    """Do `fate` before the call of a point, once."""
    where, call, file = POINTS[point]
    if rank != where:
        return
    real = getattr(os, call)
    met = False

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        path = args[0]
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if not met and Path(path).name.partition(".tmp-")[0] == file:
            met = True
            fate()
        return real(*args, **kwargs)

    setattr(os, call, wrapped)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_step_3(
    rank: int, directory: Path, point: str, fate: Callable[[], Any], timeout: float, keep: int = 1
) -> tuple[Any, str]:
    """Load step 2, go on, and meet a fate in saving step 3: the error, and the digest by then."""
    model, optimizer = build("fsdp2", 2)
    assert load_latest(directory, model, optimizer) is not None
    train(model, optimizer, rank, 2, 1)
    now = digest(model, optimizer)
    meet(point, rank, fate)
    error = None
    start = time.monotonic()
    try:
        save_checkpoint(directory, 3, model, optimizer, keep=keep, timeout=timeout)
    except (CheckpointError, PeerFailure, PhaseTimeout) as caught:
        error = caught
    assert time.monotonic() - start < timeout + 5
    if not isinstance(error, CheckpointError):
        return error, now
    # Training goes on, and the next save is whole.
    assert [c.step for c in list_checkpoints(directory)] == [2]
    dist.barrier()
    train(model, optimizer, rank, 3, 1)
    save_checkpoint(directory, 4, model, optimizer, keep=1)
    dist.barrier()  # rank 0 removes old checkpoints while the others go on
    assert [c.step for c in list_checkpoints(directory)] == [4]
    return error, now


def save_failing(rank: int, world_size: int, root: Path, saved: Path) -> list[str]:
    texts = []
    for number, point in enumerate(POINTS):
        directory = root / str(number) / "checkpoints"
        if rank == 0:
            shutil.copytree(saved, directory)
        dist.barrier()
        names = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "rename")}
        error, _ = save_step_3(rank, directory, point, no_space, 60)
        for name, real in names.items():
            setattr(os, name, real)
        texts.append(str(error))
    return texts


def save_and_die(rank: int, world_size: int, directory: Path, point: str) -> Any:
    return save_step_3(rank, directory, point, die, 30)


def save_and_stop(rank: int, world_size: int, directory: Path, point: str) -> Any:
    return save_step_3(rank, directory, point, stop, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Step 2 of a training on two ranks, and its digest."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    return directory, run(save_one, 2, directory, "fsdp2")[0][0]


@pytest.fixture
def copy(saved: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def test_a_failing_rank_is_an_error_on_both(tmp_path: Path, saved: tuple[Path, str]) -> None:
    texts = run(save_failing, 2, tmp_path, saved[0])
    assert texts[0] == texts[1]
    for point, text in zip(POINTS, texts[0], strict=True):
        if point == "in the removal":
            assert text == "None", "the checkpoint is saved; there was a warning"
        else:
            rank = POINTS[point][0]
            assert f"failed on rank {rank}: OSError: [Errno 28] No space left" in text, point


def check_after(copy: Path, step_2: str, renamed: bool) -> None:
    """What is there is one whole checkpoint, of step 3 from the rename on."""
    left = list_checkpoints(copy)
    assert verify_checkpoint(left[-1].path) == []
    assert left[-1].step == (3 if renamed else 2)
    if not renamed:
        assert {result[0] for result in run(load_one, 2, copy, "fsdp2")} == {step_2}


@pytest.mark.parametrize(
    "point",
    [
        name if name in ("in its write", "after the rename")
        else pytest.param(name, marks=pytest.mark.full)
        for name in POINTS
    ],
)  # fmt: skip
def test_a_dead_rank(copy: Path, saved: tuple[Path, str], point: str) -> None:
    endings = run_to_the_end(save_and_die, 2, copy, point)
    dead = POINTS[point][0]
    assert endings[dead].signal == 9, endings[dead].text
    other = endings[1 - dead]
    assert other.error is None, other.text
    error, _ = other.result
    if point == "in the removal":  # rank 0 dies when all are done
        assert error is None
    else:
        assert isinstance(error, PeerFailure)
        phase = "write" if dead == 1 else "commit"
        assert error.phase == f"save_checkpoint: {phase}"
    check_after(copy, saved[1], point in ("after the rename", "in the removal"))


def test_a_stopped_rank(copy: Path, saved: tuple[Path, str]) -> None:
    endings = run_to_the_end(save_and_stop, 2, copy, "in its write", stopped=(1,))
    assert endings[0].error is None, endings[0].text
    error, _ = endings[0].result
    assert isinstance(error, PhaseTimeout)
    assert error.phase == "save_checkpoint: write"
    assert error.seconds == 2
    check_after(copy, saved[1], False)


def save_differently(rank: int, world_size: int, directory: Path) -> list[str]:
    """Ranks that do not save the same, or whose arguments are wrong on one of them."""
    texts = []
    model, optimizer = build("plain", 1)

    def attempt(**options: Any) -> None:
        step = options.pop("step", 1)
        try:
            save_checkpoint(directory, step, model, optimizer, **options)
        except (Disagreement, CheckpointError, TypeError) as error:
            texts.append(f"{type(error).__name__}: {error}")

    attempt(step=1 + rank)
    attempt(parameters=("trainable", "all")[rank])
    optimizer.param_groups[0]["eps"] = (1e-8, 1e-7)[rank]
    attempt()
    optimizer.param_groups[0]["eps"] = 1e-8
    attempt(extra=(1, object())[rank])
    assert list_checkpoints(directory) == []
    attempt()
    assert [c.step for c in list_checkpoints(directory)] == [1]
    return texts


def test_ranks_that_disagree_write_nothing(tmp_path: Path) -> None:
    ours, theirs = run(save_differently, 2, tmp_path / "checkpoints")
    assert ours[:3] == theirs[:3]
    start = "Disagreement: save_checkpoint: what is saved must be the same on all ranks, got "
    assert ours[0] == start + "step 1 on rank 0; step 2 on rank 1"
    assert ours[1] == start + "parameters trainable on rank 0; parameters all on rank 1"
    assert ours[2] == start + "option eps 1e-08 on rank 0; option eps 1e-07 on rank 1"
    assert theirs[3].startswith("TypeError: save_checkpoint: extra must be made of")
    assert ours[3].startswith("CheckpointError: save_checkpoint: checking the arguments failed on")
    assert len(ours) == 4


def load_damaged(rank: int, world_size: int, directory: Path) -> tuple[Any, bool]:
    model, optimizer = build("fsdp2", world_size)
    before = digest(model, optimizer)
    try:
        load_latest(directory, model, optimizer)
    except CorruptShard as error:
        return error, digest(model, optimizer) == before
    return None, False


def test_damage_is_one_error_on_all_ranks(copy: Path) -> None:
    """The file, the tensor and the rank that wrote it, whoever has found it."""
    file = copy / "step-2" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[300] ^= 4
    file.write_bytes(data)
    (damage,) = verify_checkpoint(copy / "step-2")
    assert damage.rank == 1
    for error, unchanged in run(load_damaged, 2, copy):
        assert unchanged
        assert (error.file, error.parameter, error.rank) == (str(file), damage.parameter, 1)


def test_a_file_of_another_rank_or_training(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(save_one, 2, other, "fsdp2", {"lr": 0.5})
    file = copy / "step-2" / "__1_0.distcp"
    shutil.copy(other / "step-2" / "__1_0.distcp", file)
    damage = verify_checkpoint(copy / "step-2")
    assert damage
    assert {(error.file, error.rank) for error in damage} == {(str(file), 1)}
    shutil.copy(copy / "step-2" / "__0_0.distcp", file)
    damage = verify_checkpoint(copy / "step-2")
    assert {(error.file, error.rank) for error in damage} == {(str(file), 1)}


def save_in_a_part(rank: int, world_size: int, directory: Path) -> Any:
    """Two of three ranks save and load in a group of their own; the third knows nothing of it."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    model, optimizer = build("plain", 1)
    train(model, optimizer, rank, 0, 1)
    save_checkpoint(directory, 1, model, optimizer, rank_extra=rank, process_group=group)
    loaded = load_latest(directory, model, optimizer, process_group=group)
    assert loaded is not None
    return loaded.world_size, loaded.rank_extra


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    assert run(save_in_a_part, 3, tmp_path) == [None, (2, 1), (2, 2)]
