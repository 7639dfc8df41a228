"""Models and optimizers that the checkpoint tests save and load, and digests to compare them by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from feinwerk.distributed.checkpoint.names import canonical
from feinwerk.optim import AdamW
from tests.optim.fault_ranks import run_to_the_end

# Small enough to be saved hundreds of times, and with every kind of state all the same.
OPTIONS: dict[str, Any] = {"min_quantized_numel": 64, "blocksize": 8, "lr": 1e-2}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantized matrix with uneven rows, a vector, a frozen layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 3)).to(dtype)
    model[2].requires_grad_(False)
    return model


def tiny_optimizer(model: nn.Module, **options: Any) -> AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, **{**OPTIONS, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    """Steps `first` to `first + count - 1`; each has data of its own."""
    dtype = next(model.parameters()).dtype
    for step in range(first, first + count):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered from all ranks if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that a resumed training needs, whole, by name. A collective for DTensors."""
    found = {}
    for wrapped, parameter in model.named_parameters():
        name = canonical(model, wrapped)
        found[f"model.{name}"] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = whole(value)
    return found


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """One hash of all contents, their names, dtypes and shapes."""
    total = hashlib.sha256()
    for name, tensor in sorted(contents(model, optimizer).items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run(function: Callable[..., Any], world_size: int, *args: Any, limit: float = 120) -> list[Any]:
    """The results of `function(rank, world_size, *args)`; every rank must have one."""
    endings = run_to_the_end(function, world_size, *args, limit=limit)
    bad = [e.error is not None or e.signal is not None or e.stuck for e in endings]
    assert not any(bad), "\n".join(
        f"rank {i}: signal {e.signal}, stuck: {e.stuck}\n{e.text}" for i, e in enumerate(endings)
    )
    return [ending.result for ending in endings]


def file_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}
