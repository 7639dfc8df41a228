"""The global gradient norm with the same bits for every way that rows are spread over ranks.

```
   row of a gradient ──> fp64 sum of squares, in an order that depends on the row's length only
   all of these      ──> exact sum in 30-bit limbs: integer addition has no order
   all ranks         ──> one all-reduce (SUM) of 22 integers, then a square root
```
A float sum depends on how its terms are grouped, so that a clipped run would take another path on
every other world size. An element of a vector is a row of its own here: a shard may end anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from feinwerk.ops import square_sum
from feinwerk.optim.state import is_dtensor, to_local

# What `square_sum` returns: limbs of so many bits from 2^-300 on, then two counters.
SQUARE_SUM_LENGTH = 22
LIMB_BITS = 30
LOWEST = -300


def norm_of(limbs: torch.Tensor) -> float:
    """Return the square root of a sum that `square_sum` gave, or of several added up.

    Args:
        limbs: int64 [22].

    Returns:
        The norm; NaN if any row had a NaN, else infinity if any had one.

    Example:
        >>> from feinwerk import square_sum
        >>> norm_of(square_sum([torch.tensor([1.0, float("inf")])]))
        inf
    """
    *digits, infinities, nans = limbs.tolist()
    if nans or infinities:
        return math.nan if nans else math.inf
    total = sum(digit << LIMB_BITS * i for i, digit in enumerate(digits))
    # Halving an even exponent is exact.
    return math.sqrt(float(total)) * 2.0 ** (LOWEST // 2)


def clip_coefficient(norm: float, max_grad_norm: float) -> float:
    """Return what gradients of a norm are multiplied by: min(1, max_grad_norm / (norm + 1e-6)).

    As `torch.nn.utils.clip_grad_norm_` has it. A norm that is NaN gives NaN.

    Example:
        >>> clip_coefficient(0.5, 1.0)
        1.0
    """
    coefficient = max_grad_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1 else coefficient


def local_gradient(param: torch.Tensor) -> torch.Tensor | None:
    """Return the rows of `param.grad` that this rank holds, cut as the parameter is; or None."""
    grad = param.grad
    if grad is None or not is_dtensor(grad):
        return grad
    if is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        grad = grad.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return to_local(grad)


def gradient_norm(params: torch.Tensor | Iterable[torch.Tensor]) -> float:
    """Return the norm of the gradients of all parameters, as one vector.

        sqrt(sum over all gradients g of g^2)

    The same bits for every number of threads and, over DTensors sharded on dimension 0, for every
    world size: see the module's text. `torch.nn.utils.get_total_norm` differs in its last bits.

    Args:
        params: tensors with or without gradients, fp32, bf16 or fp16. If some are DTensors, every
            rank of their meshes must call this, with the same parameters in the same order.

    Returns:
        The norm; NaN or infinity if a gradient has one.

    Raises:
        TypeError: if a gradient has another dtype.

    Example:
        >>> w = torch.ones(2, 2, requires_grad=True)
        >>> (2 * w).sum().backward()
        >>> gradient_norm([w])
        4.0
    """
    return norm_of(reduced_square_sum([params] if isinstance(params, torch.Tensor) else params))


def reduced_square_sum(params: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return `square_sum` of the gradients, summed over the ranks that DTensors are sharded over.

    Args:
        params: as `gradient_norm` takes them.

    Returns:
        int64 [22], the same on all ranks: on the gradients' device, or on the CPU if there are
        several.
    """
    parts = []
    for sharding, members in _by_sharding(params).items():
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for param in members:
            if (grad := local_gradient(param)) is not None:
                by_device.setdefault(grad.device, []).append(grad)
        limbs = _sum([square_sum(grads) for grads in by_device.values()])
        parts.append(_all_reduce(limbs, sharding, "SUM"))
    return _sum(parts)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """On the device of all of them, or on the CPU."""
    if len({part.device for part in parts}) != 1:
        parts = [part.cpu() for part in parts]
    start = torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64, device="cpu")
    return sum(parts[1:], parts[0]) if parts else start


def first_nonfinite(params: Sequence[torch.Tensor]) -> int | None:
    """Return the index of the first parameter whose gradient is not finite on any rank, or None.

    Args:
        params: as `gradient_norm` takes them.
    """
    first = len(params)
    index = {id(param): i for i, param in enumerate(params)}
    for sharding, members in _by_sharding(params).items():
        found = len(params)
        for param in members:
            grad = local_gradient(param)
            if grad is not None and not bool(grad.isfinite().all()):
                found = min(found, index[id(param)])
        first = min(first, int(_all_reduce(torch.tensor(found), sharding, "MIN")))
    return None if first == len(params) else first


def _by_sharding(params: Iterable[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    """Parameters by the mesh and its dimensions that they are sharded over; None for plain ones.

    Parameters without a gradient count: all ranks must come to the same list of all-reduces.
    """
    members: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        sharding = None
        if is_dtensor(param):
            mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
            cut = (i for i, placement in enumerate(placements) if not placement.is_replicate())
            sharding = mesh, tuple(cut)
        members.setdefault(sharding, []).append(param)
    return members


def _all_reduce(value: torch.Tensor, sharding: Any, op: str) -> torch.Tensor:
    if sharding is None:
        return value
    import torch.distributed as dist

    mesh, dims = sharding
    value = value.to(mesh.device_type)
    for dim in dims:
        dist.all_reduce(value, getattr(dist.ReduceOp, op), group=mesh.get_group(dim))
    return value
