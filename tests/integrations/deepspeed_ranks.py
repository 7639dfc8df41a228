"""What the ranks of the DeepSpeed tests do: train over ZeRO on gloo, save, resume, report."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from feinwerk import optim
from feinwerk.integrations import deepspeed as ours

STEPS = 4
LR = 1e-2
# (name, zero_optimization, further configuration)
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1": ({"stage": 1}, {}),
    "2": ({"stage": 2}, {}),
    # Several vectors a rank, which the optimizer sees one at a time.
    "3": ({"stage": 3, "sub_group_size": 1500}, {}),
    "2-bf16": ({"stage": 2}, {"bf16": {"enabled": True}}),
    "2-clip": ({"stage": 2}, {"gradient_clipping": 0.1}),
    "1-offload": ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, {}),
    "3-offload": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}),
}


def make_model() -> nn.Module:
    """A model with a frozen layer and sizes that no blocksize or world size divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(50, 65), nn.GELU(), nn.Linear(65, 65), nn.GELU(), nn.Linear(65, 7)
    )
    model[2].requires_grad_(False)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Weights, which decay, and biases, which do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over the groups: "torch", "8", "16" or "32"."""
    if kind == "torch":
        return torch.optim.AdamW(groups_of(model), lr=LR)
    return ours.AdamW(groups_of(model), lr=LR, state_bits=int(kind))


def batch_of(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One part of the batch of 12 of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 50, generator=generator)
    y = x[:, :7].argmax(dim=1)
    own = slice(part * 12 // parts, (part + 1) * 12 // parts)
    return x[own], y[own]


def train_plainly(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, parts: int, steps: int = STEPS
) -> list[float]:
    """One process with the mean of the parts' gradients; losses of part 0."""
    losses = []
    for step in range(first, first + steps):
        for part in range(parts):
            x, y = batch_of(step, part, parts)
            loss = F.cross_entropy(model(x), y)
            (loss / parts).backward()
            if part == 0:
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain_run(state_bits: int, parts: int, steps: int) -> tuple[nn.Module, optim.AdamW]:
    """What one process without DeepSpeed makes of the same steps."""
    model = make_model()
    optimizer = optim.AdamW(groups_of(model), lr=LR, state_bits=state_bits)
    train_plainly(model, optimizer, 0, parts, steps)
    return model, optimizer


def masters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters of a plain model, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def start_deepspeed(rank: int, world_size: int) -> Any:
    """Import DeepSpeed in a process whose default group is there; nothing is ever compiled."""
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    import deepspeed
    import deepspeed.ops

    # DeepSpeed compiles what it finds compatible, for minutes; this is where it looks.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, of what DeepSpeed calls
    return deepspeed


def make_engine(
    deepspeed: Any, name: str, kind: str, universal: bool = False
) -> tuple[Any, torch.optim.Optimizer]:
    """A fresh model in one of the ENGINES, and the client optimizer in it."""
    zero, further = ENGINES[name]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 12 // torch.distributed.get_world_size(),
        "zero_optimization": dict(zero),
        **further,
    }
    if universal:
        config["checkpoint"] = {"load_universal": True}
    model = make_model()
    optimizer = make_optimizer(kind, model)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ours.complete_config(config)
    )
    return engine, optimizer


def train(engine: Any, first: int, steps: int = STEPS) -> list[float]:
    """Losses of this rank."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(first, first + steps):
        x, y = batch_of(step, rank, world_size)
        loss = F.cross_entropy(engine(x.to(next(engine.module.parameters()).dtype)).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def states_of(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Copies of the states, by partition, which is left out."""
    return [
        {key: value.clone() for key, value in state.items()}
        for state in optimizer.state.values()
        if state
    ]


def sizes_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """Elements of the partitions that have states."""
    return [partition.numel() for partition, state in optimizer.state.items() if state]


def trained_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 masters, whole, by name: a collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(p).clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def linked_moments(engine: Any) -> set[str]:
    """What DeepSpeed itself still refers to of the states, in stages 1 and 2."""
    mappings = [getattr(p, "_hp_mapping", None) for p in engine.module.parameters()]
    return {key for mapping in mappings if mapping for key in mapping.optim_fragment or ()}


def train_and_save(
    rank: int, world_size: int, folder: str, cases: list[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Train (engine, kind of optimizer) each, save it as <engine>-<kind>, and train on."""
    deepspeed = start_deepspeed(rank, world_size)
    report = {}
    for name, kind in cases:
        engine, optimizer = make_engine(deepspeed, name, kind)
        losses = train(engine, 0)
        engine.save_checkpoint(str(Path(folder) / f"{name}-{kind}"), tag="saved")
        report[f"{name}-{kind}"] = {
            "losses": losses,
            "states": states_of(optimizer),
            "sizes": sizes_of(optimizer),
            "parameters": trained_parameters(engine),
            "later": train(engine, STEPS),
            "later_states": states_of(optimizer),
            "later_parameters": trained_parameters(engine),
        }
        engine.destroy()
    return report


def resume(
    rank: int, world_size: int, folder: str, loads: list[tuple[str, str, str]]
) -> dict[str, dict[str, Any]]:
    """Load (checkpoint, engine, kind of optimizer) each in a fresh engine and train on.

    A checkpoint whose name starts with "universal" is loaded as one. What an engine refuses is
    reported as "error".
    """
    deepspeed = start_deepspeed(rank, world_size)
    report: dict[str, dict[str, Any]] = {}
    for checkpoint, name, kind in loads:
        universal = checkpoint.startswith("universal")
        engine, optimizer = make_engine(deepspeed, name, kind, universal)
        case = report[f"{checkpoint} in {name}-{kind}"] = {}
        try:
            if universal:
                engine.load_checkpoint(folder, tag=checkpoint, load_lr_scheduler_states=False)
            else:
                engine.load_checkpoint(str(Path(folder) / checkpoint))
        except Exception as error:
            case["error"] = f"{type(error).__name__}: {error}"
            continue
        if universal:
            # Stage 3 of DeepSpeed gives all groups the options of the first.
            for group, own in zip(optimizer.param_groups, groups_of(make_model()), strict=True):
                group["weight_decay"] = own["weight_decay"]
        case |= {
            "global_steps": engine.global_steps,
            "parameters": trained_parameters(engine),
            "states": states_of(optimizer),
            "later": train(engine, STEPS),
            "later_states": states_of(optimizer),
            "later_parameters": trained_parameters(engine),
            "linked": linked_moments(engine),
        }
        engine.destroy()
    return report
