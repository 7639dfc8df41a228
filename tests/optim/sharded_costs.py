"""What a step of ShardedAdamW costs, measured on every rank: bytes on the wire, bytes of states."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from feinwerk.optim import ShardedAdamW
from feinwerk.optim.state import to_local

# In struct tcp_info of Linux, since 4.19: what has been sent, retransmissions included.
_BYTES_SENT = 200


def bytes_sent() -> int:
    """Over all TCP connections of this process, as the kernel counts them."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with contextlib.closing(socket.socket(fileno=os.dup(int(entry)))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        except OSError:
            continue
        if len(info) >= _BYTES_SENT + 8:
            total += struct.unpack_from("<Q", info, _BYTES_SENT)[0]
    return total


def state_bytes(optimizer: ShardedAdamW) -> int:
    """Of the moments that this rank holds."""
    return sum(
        to_local(tensor).nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    )


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
            found[f"{name}, stage {stage}"] = (count, sent, state_bytes(optimizer))
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
