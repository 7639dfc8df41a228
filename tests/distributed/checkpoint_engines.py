"""The engines whose checkpoints must fit each other, over one model with every awkward shape."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from feinwerk.distributed import load_latest, save_checkpoint
from feinwerk.optim import AdamW, ShardedAdamW
from tests.distributed.checkpoint_cases import OPTIONS, digest


class Awkward(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, two dtypes, one frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 11)
        self.second = nn.Linear(11, 7).bfloat16()
        self.third = nn.Linear(7, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(nn.functional.gelu(self.first(x)).bfloat16()).float()
        return self.frozen(self.third(nn.functional.gelu(x)))


def build(engine: str, world_size: int, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer.

    Args:
        engine: "plain", "ddp", "fsdp2", "hsdp", "stage1", "stage2", "stage2-cpu" or "stage2-disk".
        world_size: of the default group.
        options: of the optimizer.
    """
    torch.manual_seed(0)
    model: nn.Module = Awkward()
    if engine in ("fsdp2", "hsdp"):
        shape = (2, world_size // 2) if engine == "hsdp" else (world_size,)
        names = ("replicas", "shards") if engine == "hsdp" else ("shards",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model.first, model.second, model.third, model.frozen):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if engine == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {**OPTIONS, **options}
    if engine.startswith("stage"):
        stage, _, offload = engine.removeprefix("stage").partition("-")
        options |= {"stage": int(stage), "offload": offload or None}
        if offload == "disk":
            folder = tempfile.TemporaryDirectory()
            options |= {"offload_directory": folder.name, "offload_fsync": False}
        optimizer = ShardedAdamW(trained, **options)
        if offload == "disk":
            weakref.finalize(optimizer, folder.cleanup)
        return model, optimizer
    return model, AdamW(trained, **options)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, first: int, count: int
) -> None:
    """Steps with data of their own on every rank; AdamW over plain tensors gets that of rank 0."""
    own = isinstance(optimizer, ShardedAdamW) or isinstance(model, DistributedDataParallel)
    own = own or any(isinstance(p, DTensor) for p in model.parameters())
    for step in range(first, first + count):
        seed = 100 * step + (rank if own else 0)
        x = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_one(
    rank: int, world_size: int, directory: Path, engine: str, options: dict[str, Any] | None = None
) -> tuple[str, str]:
    """Train 2 steps, save, train 2 more; the digests at both ends."""
    model, optimizer = build(engine, world_size, **(options or {}))
    train(model, optimizer, rank, 0, 2)
    save_checkpoint(directory, 2, model, optimizer, rank_extra=("rank", rank), timeout=60)
    saved = digest(model, optimizer)
    train(model, optimizer, rank, 2, 2)
    return saved, digest(model, optimizer)


def load_one(
    rank: int, world_size: int, directory: Path, engine: str, options: dict[str, Any] | None = None
) -> tuple[str, str, Any]:
    """Load, train 2 more steps; the digests at both ends, and what belongs to the rank."""
    model, optimizer = build(engine, world_size, **(options or {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7)
    loaded = load_latest(directory, model, optimizer, timeout=60)
    assert loaded is not None
    assert loaded.step == 2
    now = digest(model, optimizer)
    train(model, optimizer, rank, 2, 2)
    return now, digest(model, optimizer), loaded.rank_extra
