"""square_sum: the list of tensors as addresses and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feinwerk import _native

_LENGTH = 22


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The limbs of the sum of squares, then the numbers of rows with infinities and NaNs."""
    limbs = _native._empty(_LENGTH, torch.int64)
    held = [tensor.contiguous() for tensor in tensors]
    views = []
    for tensor in held:
        rows = tensor.shape[0] if tensor.dim() > 1 else tensor.numel()
        cols = tensor.numel() // rows if rows else 0
        views.append((tensor.data_ptr(), _native._DTYPES[tensor.dtype], rows, cols))
    _native._C.square_sum(views, limbs.data_ptr(), limbs.numel(), torch.get_num_threads())
    return limbs
