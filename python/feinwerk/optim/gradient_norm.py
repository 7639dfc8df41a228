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

from feinwerk import _checks
from feinwerk.optim.state import is_dtensor, to_local

# Squares of fp32 numbers are multiples of 2^-298 and below 2^256: 20 limbs reach from 2^-300 to
# 2^300. A limb counts up to 2^30 a row, so that 2^33 rows fit its 63 bits.
_LIMB_BITS = 30
_LOWEST = -300
_LIMBS = 20
# Two counters follow the limbs: rows with an infinity and rows with a NaN.
SQUARE_SUM_LENGTH = _LIMBS + 2

# Elements at a time, 1 MiB in fp64. So many integers below 2^30 have an exact sum in fp64.
_SLAB = 1 << 17
# Below this row length the fold runs along columns, where neighbours in memory are added.
_SHORT_ROW = 64


def row_square_sums(grad: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of every row of a gradient, in fp64.

        while n > 1:  x[i] += x[i + ceil(n / 2)],  n = ceil(n / 2)

    over the squares of a row, which are exact: the bits of a row's sum depend on the row only.

    Args:
        grad: fp32, bf16 or fp16; rows lie along dimension 0, any whole number of them. A vector
            or a number gives the squares of its elements.

    Returns:
        fp64 [rows].

    Raises:
        TypeError: if grad has another dtype: its squares would not be exact.

    Example:
        >>> row_square_sums(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([25.,  1.], dtype=torch.float64)
    """
    _checks.floating("row_square_sums", "grad", grad)
    if grad.dim() < 2 or grad.numel() == 0:
        squares = grad.detach().reshape(-1).double()
        return squares.mul_(squares)[: grad.shape[0] if grad.dim() else 1]
    rows = grad.detach().reshape(grad.shape[0], -1)
    length = rows.shape[1]
    each = max(1, min(rows.shape[0], _SLAB // length))
    sums = torch.empty(rows.shape[0], dtype=torch.float64, device=grad.device)
    shape = (length, each) if length < _SHORT_ROW else (each, length)
    slab = torch.empty(shape, dtype=torch.float64, device=grad.device)
    if length < _SHORT_ROW:
        slab = slab.t()
    for first in range(0, rows.shape[0], each):
        some = rows[first : first + each]
        squares = slab[: some.shape[0]].copy_(some)
        squares.mul_(squares)
        while squares.shape[1] > 1:
            half = (squares.shape[1] + 1) // 2
            upper = squares[:, half:]
            squares[:, : upper.shape[1]].add_(upper)
            squares = squares[:, :half]
        sums[first : first + each] = squares[:, 0]
    return sums


def square_sum(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the exact sum of the row sums of gradients, as integers that add up over ranks.

    Use it where the gradients are spread over processes: all-reduce the result with SUM, then take
    `norm_of`. Gradients on several devices are summed on the first one's.

    Args:
        grads: any of what `row_square_sums` takes; none is a sum of zero.

    Returns:
        int64 [SQUARE_SUM_LENGTH]: the limbs of the sum / 2^-300 in base 2^30, lowest first and
        without carries, then the number of rows with an infinity and of those with a NaN.

    Example:
        >>> limbs = square_sum([torch.tensor([3.0])]) + square_sum([torch.tensor([4.0])])
        >>> norm_of(limbs)
        5.0
    """
    sums = [row_square_sums(grad) for grad in grads]
    if not sums:
        return torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64)
    device = sums[0].device
    limbs = torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64, device=device)
    # Small vectors together: one pass of a few operations each.
    joined = torch.cat([some.to(device) for some in sums])
    for first in range(0, joined.numel(), _SLAB):
        limbs += _exact_sum(joined[first : first + _SLAB])
    return limbs


def _exact_sum(values: torch.Tensor) -> torch.Tensor:
    limbs = torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64, device=values.device)
    most = float(values.amax())
    if not math.isfinite(most):
        limbs[_LIMBS], limbs[_LIMBS + 1] = values.isposinf().sum(), values.isnan().sum()
        values = torch.where(values.isfinite(), values, 0.0)
        most = float(values.amax())
    # most < 2^exponent; with it the highest limb that is not zero is known.
    exponent = math.frexp(most)[1] if most > 0 else _LOWEST
    limb = max(0, exponent - 1 - _LOWEST) // _LIMB_BITS
    rest = values * 2.0 ** -(_LOWEST + _LIMB_BITS * limb)
    whole = torch.empty_like(rest)
    while limb >= 0 and float(rest.amax()) > 0:
        torch.floor(rest, out=whole)
        limbs[limb] = whole.sum().to(torch.int64)
        rest.sub_(whole).mul_(2.0**_LIMB_BITS)
        limb -= 1
    return limbs


def norm_of(limbs: torch.Tensor) -> float:
    """Return the square root of a sum that `square_sum` gave, or of several added up.

    Args:
        limbs: int64 [SQUARE_SUM_LENGTH].

    Returns:
        The norm; NaN if any row had a NaN, else infinity if any had one.

    Example:
        >>> norm_of(square_sum([torch.tensor([1.0, float("inf")])]))
        inf
    """
    *digits, infinities, nans = limbs.tolist()
    if nans or infinities:
        return math.nan if nans else math.inf
    total = sum(digit << _LIMB_BITS * i for i, digit in enumerate(digits))
    # Halving an even exponent is exact.
    return math.sqrt(float(total)) * 2.0 ** (_LOWEST // 2)


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
        int64 [SQUARE_SUM_LENGTH] on the CPU, the same on all ranks.
    """
    total = torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64)
    for sharding, members in _by_sharding(params).items():
        grads = [grad for param in members if (grad := local_gradient(param)) is not None]
        total += _all_reduce(square_sum(grads), sharding, "SUM").cpu()
    return total


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
