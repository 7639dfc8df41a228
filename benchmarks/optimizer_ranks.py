"""Training over several processes: the time of a step, bytes on the wire, bytes of moments held."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# In struct tcp_info of Linux, since 4.19: bytes sent, and of those the bytes sent again.
_BYTES_SENT, _BYTES_AGAIN = 200, 208
ROUNDS, WARM_UP = 30, 4
ADAPTERS = "r=8 adapters of 2048 x 2048"
HELD = {
    "matrices, rows of 1024": [(1024, 1024)] * 2,
    "matrices, rows of 256": [(1024, 256)] * 2,
    ADAPTERS: [(8, 2048), (2048, 8)] * 4,
}


def bytes_sent() -> int:
    """What this process has sent over all its TCP connections, as the kernel counts it."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with contextlib.closing(socket.socket(fileno=os.dup(int(entry)))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
            sent, again = (
                struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_SENT, _BYTES_AGAIN)
            )
            total += sent - again
    return total


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the moments that this rank holds."""
    from feinwerk.optim.state import to_local

    return sum(
        to_local(value).nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    )


def stack() -> torch.nn.Module:
    """Eight layers of 1024 x 1024, the same on every rank."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(8):
        layers += [torch.nn.Linear(1024, 1024), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def sides() -> dict[str, tuple[torch.nn.Module, Any]]:
    """(model, optimizer) of ours and of the peers, who come last."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from feinwerk.optim import ShardedAdamW

    found: dict[str, tuple[torch.nn.Module, Any]] = {}
    for bits in (8, 32):
        model = stack()
        optimizer = ShardedAdamW(model.parameters(), lr=1e-4, stage=2, state_bits=bits)
        found[f"stage 2, {bits}-bit"] = model, optimizer
    replicated = DistributedDataParallel(stack())
    fused = torch.optim.AdamW(replicated.parameters(), lr=1e-4, fused=True)
    found["DDP + torch fused AdamW"] = replicated, fused
    replicated = DistributedDataParallel(stack())
    zero = ZeroRedundancyOptimizer(replicated.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    found["DDP + ZeroRedundancyOptimizer"] = replicated, zero
    return found


def train(rank: int, world_size: int, rounds: int) -> dict[str, Any]:
    """Training steps in turn; a round begins with another one each time."""
    torch.set_num_threads(1)
    candidates = sides()
    order = list(candidates)
    x = torch.randn(32, 1024, generator=torch.Generator().manual_seed(rank))
    seconds: dict[str, list[float]] = {name: [] for name in order}
    sent: dict[str, list[int]] = {name: [] for name in order}
    losses: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(WARM_UP + rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            model, optimizer = candidates[name]
            dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = bytes_sent() - before
            dist.barrier()
            losses[name].append(float(loss.detach()))
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
                sent[name].append(moved)
    check(losses)
    count = sum(p.numel() for p in stack().parameters())
    return {"parameters": count, "ranks": world_size, "seconds": seconds, "sent": sent}


def check(losses: dict[str, list[float]]) -> None:
    """What does not train as DDP does has no speed."""
    want = losses["DDP + torch fused AdamW"]
    for name, got in losses.items():
        for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            # Of the first loss, where training has brought it to nothing.
            if not abs(mine - theirs) <= 0.02 * max(theirs, 1e-3 * want[0]):
                raise AssertionError(f"{name}: loss {mine} at step {step}, DDP has {theirs}")


def held(rank: int, world_size: int, _rounds: int) -> dict[str, float]:
    """Bytes of moments, the most of any rank, as a share of unsharded fp32: 8 a parameter."""
    from feinwerk.optim import ShardedAdamW

    torch.set_num_threads(1)
    shares = {}
    for name, shapes in HELD.items():
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = ShardedAdamW(params, lr=1e-4)
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
        most = torch.tensor([moment_bytes(optimizer)])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        shares[name] = int(most) / (8 * sum(p.numel() for p in params))
    return shares


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, rounds: int, folder: str
) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    result = function(rank, world_size, rounds)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def spawned(function: Callable[..., Any], world_size: int, rounds: int = ROUNDS) -> Any:
    """Run function(rank, world_size, rounds) on every rank; rank 0's result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, world_size, rounds, folder), nprocs=world_size)
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
