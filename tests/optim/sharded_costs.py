"""What a step of ShardedAdamW costs, measured on every rank: bytes on the wire, bytes of states."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.optimizer_ranks import bytes_sent, moment_bytes
from feinwerk.optim import ShardedAdamW


def costs(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shapes in {
        "matrices": [(256, 300), (1024, 257), (512, 512)],
        "adapters": [(8, 2048), (2048, 8)] * 4,
    }.items():
        for stage in (1, 2):
            params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
            count = sum(param.numel() for param in params)
            optimizer = ShardedAdamW(params, stage=stage, bucket_mb=1)
            for _ in range(2):  # the second step exchanges no names and shapes
                loss: Any = sum((param * param).sum() for param in params)
                dist.barrier()
                before = bytes_sent()
                loss.backward()
                optimizer.step()
                sent = bytes_sent() - before
                optimizer.zero_grad()
                dist.barrier()
            found[f"{name}, stage {stage}"] = (count, sent, moment_bytes(optimizer))
            optimizer.close()
    # What the measure says of a plain all-reduce, and of nothing.
    values = torch.ones(1 << 18)
    dist.barrier()
    before = bytes_sent()
    dist.all_reduce(values)
    found["all-reduce"] = (values.numel(), bytes_sent() - before, 0)
    found["memory with stage 2"] = gradient_bytes(rank)
    return found


def gradient_bytes(rank: int) -> tuple[int, int]:
    """Elements of gradients that stay with stage 2 until the step, of how many."""
    params = [nn.Parameter(torch.ones(64, 256)) for _ in range(16)]
    optimizer = ShardedAdamW(params, stage=2, bucket_mb=0.1)
    sum((param * param).sum() for param in params).backward()
    kept = sum(param.grad.numel() for param in params if param.grad is not None)
    assert optimizer._work is not None
    reducer: Any = optimizer._work.gradients
    kept += sum(reducer._shard(i).numel() for i in range(len(optimizer._work.layout.buckets)))
    optimizer.step()
    optimizer.close()
    return kept, sum(param.numel() for param in params)
