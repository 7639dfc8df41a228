"""square_sum: check, schema and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.square_sum import cpp, reference


def _check(tensors: Sequence[torch.Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _checks.floating("square_sum", f"tensors[{i}]", tensor)
        if tensor.device != tensors[0].device:
            _checks.same_device("square_sum", f"tensors[{i}]", tensor, tensors[0].device)


def _fake(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device if tensors else "cpu"
    return torch.empty(reference.LENGTH, dtype=torch.int64, device=device)


_OP = register_op(
    "square_sum",
    "(Tensor[] tensors) -> Tensor",
    check=_check,
    reference=reference.square_sum,
    cpp=cpp.square_sum,
    fake=_fake,
    triton="feinwerk.ops.square_sum.triton",
)


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements, with the same bits for any cut into rows.

    The sum of a row (dimension 0; an element of a vector is a row of its own) is taken in fp64 in
    an order that the row's length fixes; the sum over rows is exact, in integers. So the rows may
    be spread over tensors, threads and processes: add the results up with SUM, in any order.

    Args:
        tensors: fp32, bf16 or fp16, any shapes, on one device; none is a sum of zero.

    Returns:
        int64 [22]: the limbs of the sum / 2^-300 in base 2^30, lowest first, without carries; then
        the number of rows with an infinity and of those with a NaN.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if the tensors live on different devices.

    Source:
        docs/ops/square_sum.md.

    Example:
        >>> limbs = square_sum([torch.tensor([3.0, 4.0])])
        >>> sum(limb << 30 * i for i, limb in enumerate(limbs.tolist())) * 2.0**-300
        25.0
    """
    limbs: torch.Tensor = _OP([tensor.detach() for tensor in tensors])
    return limbs
