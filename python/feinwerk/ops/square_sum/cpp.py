"""square_sum through the native extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk._native import square_sum as _square_sum


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Forward to the native kernel."""
    return _square_sum.square_sum(tensors)
