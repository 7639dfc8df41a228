"""What runs under torchrun in the Accelerate tests: prepare, train, save_state or load_state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from feinwerk import distributed
from feinwerk.optim import AdamW, ShardedAdamW
from tests.integrations.state_digest import digest
from tests.integrations.torchrun import report_kinds

STEPS, BATCH = 3, 12


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 66), nn.GELU(), nn.Linear(66, 66), nn.Linear(66, 5))


def batch_of(step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 70, generator=generator)
    own = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    return x[own], x[own, :5].argmax(dim=1)


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, first: int
) -> list[float]:
    """Two micro-batches a step; the mean losses over all ranks."""
    losses, rank, world_size = [], accelerator.process_index, accelerator.num_processes
    for step in range(first, first + STEPS):
        for micro in range(2):
            with accelerator.accumulate(model):
                x, y = batch_of(2 * step + micro, rank, world_size)
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def run(folder: Path, kind: str, resume: bool) -> dict[str, Any]:
    """One training; what it came to."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False
    )
    model = make_model()
    optimizer: AdamW
    if kind == "sharded":
        optimizer = ShardedAdamW(model.parameters(), lr=1e-2, reduce_gradients=False, timeout=60)
    else:
        optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, prepared, schedule = accelerator.prepare(model, optimizer, scheduler)
    report: dict[str, Any] = {}
    where = str(folder / kind)
    if not resume:
        report["losses"] = train(accelerator, model, prepared, schedule, 0)
        report["saved"] = digest(optimizer)
        if kind == "sharded":
            distributed.save_checkpoint(
                where, STEPS, model, optimizer, scheduler=schedule.scheduler, timeout=60
            )
        else:
            accelerator.save_state(where)
    elif kind == "sharded":
        distributed.load_latest(where, model, optimizer, scheduler=schedule.scheduler, timeout=60)
        report["loaded"] = digest(optimizer)
    else:
        accelerator.load_state(where)
        report["loaded"] = digest(optimizer)
    report["later"] = train(accelerator, model, prepared, schedule, STEPS)
    report["later_states"] = digest(optimizer)
    report["dtypes"] = sorted({str(v.dtype) for s in optimizer.state.values() for v in s.values()})
    report["lr"] = optimizer.param_groups[0]["lr"]
    accelerator.wait_for_everyone()
    return report


if __name__ == "__main__":
    report_kinds(run)
