"""What ranks do in the tests of ShardedAdamW: parameters with given gradients, and the truth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from feinwerk.optim import AdamW, ShardedAdamW

# Uneven, a vector, fewer rows than ranks, a number, nothing at all, and matrices of 8-bit states
# whose rows are no multiple of a block.
SHAPES: list[tuple[int, ...]] = [(7, 700), (130,), (2, 3), (), (0, 4), (5, 3, 2), (64, 65), (1,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def gradient(param: torch.Tensor, rank: int, step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100003 * rank + 1009 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def backward(
    params: list[Any],
    rank: int,
    step: int,
    unused: Callable[[int, int, int], bool] = lambda rank, step, index: False,
) -> None:
    """Give every used parameter its gradient, by a backward: it is exactly the factor."""
    loss: Any = sum(
        (param * gradient(param, rank, step, i)).sum()
        for i, param in enumerate(params)
        if param.requires_grad and not unused(rank, step, i)
    )
    if isinstance(loss, torch.Tensor):
        loss.backward()


def average(
    param: torch.Tensor,
    index: int,
    ranks: range,
    step: int,
    unused: Callable[[int, int, int], bool] = lambda rank, step, index: False,
) -> torch.Tensor | None:
    """Summed in fp32 in the order of the ranks, then divided; None if no rank has a gradient."""
    if not param.requires_grad or all(unused(rank, step, index) for rank in ranks):
        return None
    total = torch.zeros(param.shape)
    for rank in ranks:
        if not unused(rank, step, index):
            total += gradient(param, rank, step, index).float()
    return (total / len(ranks)).to(param.dtype)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(
    params: list[Any], optimizer: ShardedAdamW, plain: list[Any], reference: AdamW
) -> list[str]:
    """What is not the same bits in parameters and states, on this rank; collective."""
    found = []
    for i, (param, other) in enumerate(zip(params, plain, strict=True)):
        if not torch.equal(param.detach(), other.detach()):
            found.append(f"parameter {i}")
        mine, truth = optimizer.state.get(param, {}), reference.state.get(other, {})
        if set(mine) != set(truth):
            found.append(f"state of {i}: {sorted(mine)} instead of {sorted(truth)}")
            continue
        for name in sorted(mine):
            full = whole(mine[name])
            if full.dtype != truth[name].dtype or not torch.equal(full, truth[name]):
                found.append(f"{name} of {i}")
    return found


Make = Callable[[list[Any]], Any]


def compare_with_plain(
    rank: int,
    world_size: int,
    options: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    give: Make = lambda params: params,
    unused: Callable[[int, int, int], bool] = lambda rank, step, index: False,
    steps: int = 3,
    same_gradients: bool = False,
    **plain_options: Any,
) -> list[str]:
    """Train both, ShardedAdamW on this rank's gradients and AdamW on their averages."""
    params, plain = parameters(dtype), parameters(dtype)
    optimizer = ShardedAdamW(give(params), lr=0.01, **options, **plain_options)
    reference = AdamW(give(plain), lr=0.01, **plain_options)
    ranks = range(world_size)
    for step in range(steps):
        for i, param in enumerate(plain):
            # Equal gradients on all ranks have themselves as their average, also in bf16.
            one = range(1) if same_gradients or not options.get("reduce_gradients", True) else ranks
            param.grad = average(param, i, one, step, unused)
        if options.get("reduce_gradients", True):
            backward(params, 0 if same_gradients else rank, step, unused)
        else:
            for i, param in enumerate(params):
                param.grad = average(param, i, range(1), step, unused)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    found = differences(params, optimizer, plain, reference)
    if optimizer.last_grad_norm != reference.last_grad_norm:
        found.append(f"norm {optimizer.last_grad_norm} instead of {reference.last_grad_norm}")
    optimizer.close()
    return found


def freeze(params: list[Any]) -> list[Any]:
    for i in (1, 6):
        params[i].requires_grad_(False)
    return params


def groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        {"params": params[:3], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[3:], "betas": (0.8, 0.9), "blocksize": 64},
    ]


def named(params: list[Any]) -> list[tuple[str, Any]]:
    return [(f"p{i}", param) for i, param in enumerate(params)]


def alternating(rank: int, step: int, index: int) -> bool:
    """Unused on some ranks only, on all of them, at some steps, in one step everything."""
    return index == 2 or (index + rank + step) % 3 == 0 or (rank == 1 and step == 1)


def all_bits(rank: int, world_size: int) -> dict[str, list[str]]:
    """Every way to run it, each against plain AdamW."""
    found = {}
    for stage in (1, 2):
        for bucket_mb in (0.001, 0.02, 25):
            options = {"stage": stage, "bucket_mb": bucket_mb}
            found[f"{options}"] = compare_with_plain(rank, world_size, options)
    cases: dict[str, dict[str, Any]] = {
        "32 bits": {"state_bits": 32},
        "16 bits": {"state_bits": 16},
        "vectors and small matrices": {"min_quantized_numel": 1, "blocksize": 7},
        "clipping": {"max_grad_norm": 1.0},
        "maximize": {"maximize": True},
        "frozen": {"give": freeze},
        "groups": {"give": groups},
        "names": {"give": named},
        "unused": {"unused": alternating, "steps": 4},
        "bf16 remainder": {"dtype": torch.bfloat16, "same_gradients": True},
        "bf16 stochastic": {
            "dtype": torch.bfloat16, "same_gradients": True, "bf16_params": "stochastic", "seed": 5,
        },
    }  # fmt: skip
    for name, case in cases.items():
        for stage in (1, 2):
            options = {"stage": stage, "bucket_mb": 0.02}
            found[f"{name}, stage {stage}"] = compare_with_plain(rank, world_size, options, **case)
    for name, options in {
        "no overlap": {"overlap": False, "bucket_mb": 0.001},
        "reduced already": {"reduce_gradients": False},
        "offload": {"offload": "cpu"},
    }.items():
        found[name] = compare_with_plain(rank, world_size, options)
    return {**found, **accumulation(rank, world_size)}


def accumulation(rank: int, world_size: int) -> dict[str, list[str]]:
    """Micro-batches: without communication but for the last, and with it every time."""
    found = {}
    for stage in (1, 2):
        for synchronized in (False, True):
            params, plain = parameters(), parameters()
            optimizer = ShardedAdamW(params, lr=0.01, stage=stage, bucket_mb=0.02)
            reference = AdamW(plain, lr=0.01)
            for step in range(2):
                parts = range(3 * step, 3 * step + 3)
                for part in parts:
                    last = part == parts[-1] or synchronized
                    with contextlib.nullcontext() if last else optimizer.no_sync():
                        backward(params, rank, part)
                for i, param in enumerate(plain):
                    param.grad = _accumulated(param, i, world_size, parts, stage, synchronized)
                optimizer.step()
                reference.step()
                optimizer.zero_grad()
            name = f"stage {stage}, synchronized {synchronized}"
            found[name] = differences(params, optimizer, plain, reference)
            optimizer.close()
    return found


def _accumulated(
    param: torch.Tensor, i: int, world_size: int, parts: range, stage: int, synchronized: bool
) -> torch.Tensor:
    """In the order in which it happens: sums of averages, or the average of sums."""
    total = torch.zeros(param.shape)
    if synchronized and stage == 2:
        for part in parts:
            mean = average(param, i, range(world_size), part)
            assert mean is not None
            total += mean
        return total
    for rank in range(world_size):
        mine = torch.zeros(param.shape)
        for part in parts:
            mine += gradient(param, rank, part, i)
        total += mine
    return total / world_size
