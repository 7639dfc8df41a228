"""A small training with checkpoints, in which a rank meets its fate at a named point."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from feinwerk.distributed import load_latest, save_checkpoint
from feinwerk.optim import ShardedAdamW, ShardingError
from feinwerk.optim.collectives import on_reached
from feinwerk.optim.state import to_local
from tests.optim.fault_ranks import die, stop

STEPS, EVERY = 6, 2
# Points of a step, as the package marks them; each in the order in which a step comes to them.
STEP_POINTS = (
    "backward hook",
    "between reduce-scatter and step",
    "in step",
    "before all-gather",
)
# Points of a save: before or after which file-system call of it.
SAVE_POINTS = ("before write", "after write", "before rename", "after rename")


class Fault(NamedTuple):
    """What happens to whom, and where.

    Attributes:
        rank: whose fate it is.
        step: in which step, counted from 1.
        point: one of `STEP_POINTS`, or of `SAVE_POINTS` in the save after that step.
        count: at which time the point is reached in this step.
        how: "die" or "stop".
    """

    rank: int
    step: int
    point: str
    count: int = 1
    how: str = "die"


class Trained(NamedTuple):
    """What a training came to on one rank: an error and how long it was in coming, or none."""

    first: int
    losses: list[float]
    digest: str = ""
    error: RuntimeError | None = None
    waited: float = 0.0


def model_and_optimizer(**options: Any) -> tuple[nn.Module, ShardedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(33, 130), nn.Tanh(), nn.Linear(130, 65), nn.Tanh(), nn.Linear(65, 3)
    )
    given = {"lr": 0.01, "bucket_mb": 0.01, "max_grad_norm": 1.0, **options}
    return model, ShardedAdamW(model.named_parameters(), **given)


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(5, 33, generator=generator), torch.randn(5, 3, generator=generator)


def train_one(model: nn.Module, optimizer: ShardedAdamW, rank: int, step: int) -> float:
    x, target = batch(rank, step)
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def digest(model: nn.Module, optimizer: ShardedAdamW) -> str:
    """Of all parameters and of this rank's states, bit by bit."""
    found = hashlib.sha256()
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        for key, tensor in [("", param), *sorted(state.items())]:
            local = to_local(tensor).detach().contiguous().reshape(-1)
            found.update(f"{name} {key} {tuple(tensor.shape)}".encode())
            found.update(local.view(torch.uint8).numpy().tobytes() if local.numel() else b"")
    return found.hexdigest()


def arm(fault: Fault, fate: Callable[[], None]) -> None:
    """Have a point of the step that begins meet its fate."""
    count = 0

    def at(point: str) -> None:
        nonlocal count
        if point == fault.point:
            count += 1
            if count == fault.count:
                fate()

    on_reached(at)


def arm_save(fault: Fault, fate: Callable[[], None]) -> None:
    """Have a file-system call of the save that begins meet its fate."""
    before, name = fault.point.split()
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Not the writes of states on disk, nor the renaming of files within the checkpoint.
        if name == "rename" and Path(args[1]).name != f"step-{fault.step}":
            return real(*args, **kwargs)
        if name == "write" and ".tmp-" not in os.readlink(f"/proc/self/fd/{args[0]}"):
            return real(*args, **kwargs)
        if before == "before":
            fate()
        try:
            return real(*args, **kwargs)
        finally:
            fate()

    setattr(os, name, call)


def train(
    rank: int,
    world_size: int,
    folder: str,
    fault: Fault | None = None,
    timeout: float = 20.0,
    options: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> Trained:
    """Go on from the last checkpoint to the end, or to an error between ranks."""
    given = dict(options or {})
    if "offload_directory" in given:
        given["offload_directory"] = f"{folder}/states"
    model, optimizer = model_and_optimizer(timeout=timeout, first_step_timeout=timeout, **given)
    checkpoints = Path(folder) / "checkpoints"
    loaded = load_latest(checkpoints, model, optimizer, timeout=timeout)
    first = 0 if loaded is None else loaded.step
    losses: list[float] = []
    begin = time.monotonic()
    try:
        for step in range(first + 1, steps + 1):
            mine = fault is not None and fault.rank == rank and fault.step == step
            if mine and fault is not None:
                fate = die if fault.how == "die" else stop
                (arm if fault.point in STEP_POINTS else arm_save)(fault, fate)
            begin = time.monotonic()
            losses.append(train_one(model, optimizer, rank, step))
            begin = time.monotonic()
            if step % EVERY == 0:
                save_checkpoint(checkpoints, step, model, optimizer, timeout=timeout)
    except ShardingError as error:
        return Trained(first, losses, "", error, time.monotonic() - begin)
    return Trained(first, losses, digest(model, optimizer))
