"""What the ranks of the universal checkpoint tests do: sharded optimizers write and read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from feinwerk import optim
from feinwerk.integrations.deepspeed import export_universal, import_universal

ENGINES = ("plain", "fsdp2", "sharded", "sharded-disk")


def build(engine: str, dtype: torch.dtype, folder: str) -> tuple[nn.Module, optim.AdamW]:
    """A model of uneven sizes with a frozen layer, in one of the ENGINES."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 65), nn.Tanh(), nn.Linear(65, 65), nn.Linear(65, 7))
    model = model.to(dtype)
    model[2].requires_grad_(False)
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not engine.startswith("sharded"):
        return model, optim.AdamW(trained, lr=1e-2)
    options: dict[str, Any] = {}
    if engine == "sharded-disk":
        options = {"offload": "disk", "offload_directory": folder, "offload_fsync": False}
    return model, optim.ShardedAdamW(trained, lr=1e-2, timeout=60, **options)


def train(model: nn.Module, optimizer: optim.AdamW, first: int, steps: int = 3) -> None:
    """The same batch on every rank: the mean over 2 or 4 ranks is its gradient, exactly."""
    for step in range(first, first + steps):
        x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value: torch.Tensor) -> torch.Tensor:
    """Gathered, if it is sharded."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def content(model: nn.Module, optimizer: optim.AdamW) -> dict[str, torch.Tensor]:
    """All parameters and states, whole, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = whole(value)
    return found


def export_all(
    rank: int, world_size: int, folder: str, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """Train in every engine and write <folder>/<engine>; what was written."""
    report = {}
    for engine in ENGINES:
        model, optimizer = build(engine, dtype, str(Path(folder) / "disk-out"))
        train(model, optimizer, 0)
        export_universal(model, optimizer, Path(folder) / engine, timeout=60)
        report[engine] = content(model, optimizer)
    return report


def import_all(
    rank: int, world_size: int, folder: str, dtype: torch.dtype, source: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Read one folder in every engine; what came, and after a step more."""
    report = {}
    for engine in ENGINES:
        model, optimizer = build(engine, dtype, str(Path(folder) / "disk-in"))
        train(model, optimizer, 9, steps=1)  # what is there is replaced
        assert import_universal(Path(folder) / source, model, optimizer, timeout=60) == 3
        report[engine] = content(model, optimizer)
        train(model, optimizer, 3, steps=1)
        report[f"{engine} later"] = content(model, optimizer)
    return report
