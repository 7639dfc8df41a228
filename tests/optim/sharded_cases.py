"""What ranks do in the tests of ShardedAdamW: parameters with given gradients, and the truth."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from feinwerk.optim import AdamW, ShardedAdamW

# Uneven, tiny, fewer rows than ranks, a number, nothing at all, a vector, a matrix of 8-bit states
# whose rows are no multiple of a block.
SHAPES: list[tuple[int, ...]] = [(7, 700), (130,), (2, 3), (), (0, 4), (5, 3, 2), (64, 65), (1,)]


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def gradient(param: torch.Tensor, rank: int, step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100003 * rank + 1009 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def backward(params: list[Any], rank: int, step: int, skip: tuple[int, ...] = ()) -> None:
    """Give every parameter its gradient, by a backward: it is exactly the factor."""
    loss: Any = sum(
        (param * gradient(param, rank, step, i)).sum()
        for i, param in enumerate(params)
        if i not in skip
    )
    loss.backward()


def averages(params: list[Any], ranks: list[int], step: int) -> list[torch.Tensor]:
    """Summed in fp32 in the order of the ranks, then divided."""
    found = []
    for i, param in enumerate(params):
        total = torch.zeros(param.shape)
        for rank in ranks:
            total += gradient(param, rank, step, i).float()
        found.append(total / len(ranks))
    return found


def bits(params: list[Any]) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def smoke(rank: int, world_size: int) -> Any:
    params = parameters()
    optimizer = ShardedAdamW(params, lr=0.01, stage=2, bucket_mb=0.01)
    for step in range(3):
        backward(params, rank, step)
        optimizer.step()
        optimizer.zero_grad()
    plain = parameters()
    reference = AdamW(plain, lr=0.01)
    for step in range(3):
        for param, grad in zip(plain, averages(plain, list(range(world_size)), step), strict=True):
            param.grad = grad
        reference.step()
    return [torch.equal(a, b) for a, b in zip(params, plain, strict=True)]
