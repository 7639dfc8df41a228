"""A disk that is full at a save, and a store that dies with its rank."""

from __future__ import annotations

import resource
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from feinwerk.distributed import CheckpointError, list_checkpoints, save_checkpoint
from feinwerk.optim import PeerFailure, PhaseTimeout
from tests.optim.fault_ranks import die, run_to_the_end
from tests.optim.fault_training import Fault, arm, digest, model_and_optimizer, train, train_one


def save_on_a_full_disk(rank: int, world_size: int, folder: str) -> tuple[str, str, list[float]]:
    """Steps 1 to 6; rank 1 may write no large file at step 4."""
    model, optimizer = model_and_optimizer(timeout=20, first_step_timeout=20)
    checkpoints, message, losses = Path(folder) / "checkpoints", "", []
    for step in range(1, 7):
        losses.append(train_one(model, optimizer, rank, step))
        if step % 2:
            continue
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 4 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            save_checkpoint(checkpoints, step, model, optimizer, timeout=20)
        except CheckpointError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return message, digest(model, optimizer), losses


def test_training_goes_on_after_a_save_on_a_full_disk(tmp_path: Path) -> None:
    whole = run_to_the_end(train, 2, str(tmp_path / "whole"))
    endings = run_to_the_end(save_on_a_full_disk, 2, str(tmp_path))
    for ending, truth in zip(endings, whole, strict=True):
        assert ending.error is None, ending.text
        message, state, losses = ending.result
        assert "write failed on rank 1: OSError" in message
        assert "File too large" in message
        assert (state, losses) == (truth.result.digest, truth.result.losses)
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [2, 6]


def train_on_a_store_of_rank_0(
    rank: int, world_size: int, folder: str, point: str
) -> tuple[str, str, tuple[int, ...]]:
    """As with `init_method="env://"`: the store is a thread of rank 0 and dies with it."""
    ports: list[Any] = [None]
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports[0] = server.port
    dist.broadcast_object_list(ports)
    dist.destroy_process_group()
    store = dist.TCPStore(
        "127.0.0.1", ports[0], world_size, is_master=False, timeout=timedelta(seconds=20)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model, optimizer = model_and_optimizer(timeout=5, first_step_timeout=20)
    for step in range(1, 7):
        if step == 3 and rank == 0:
            arm(Fault(0, 3, point), die)
        try:
            train_one(model, optimizer, rank, step)
        except (PeerFailure, PhaseTimeout) as error:
            return type(error).__name__, error.phase, error.peers
    return "", "", ()


@pytest.mark.parametrize(
    "point", ["backward hook", pytest.param("in step", marks=pytest.mark.full)]
)
def test_a_store_that_dies_with_rank_0(point: str, tmp_path: Path) -> None:
    endings = run_to_the_end(train_on_a_store_of_rank_0, 3, str(tmp_path), point, limit=40)
    assert endings[0].signal == signal.SIGKILL, endings[0].text
    for ending in endings[1:]:
        assert ending.error is None, ending.text
        assert not ending.stuck
        name, phase, peers = ending.result
        assert name == "PeerFailure"
        assert phase
        assert peers in ((), (0,)), "without the store nobody can be named for sure"
