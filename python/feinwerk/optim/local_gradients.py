"""LocalGradients: gradients that need no reduction, of one rank alone or reduced by another engine.

It has the methods of GradientReducer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk.optim.buckets import Bucket, Slot


class LocalGradients:
    """Rows of `grad` of every parameter.

    Args:
        params: parameters, as the slots of the buckets count them.
        buckets: of them.
        rank: whose rows.
    """

    begun = False
    stale = False

    def __init__(
        self, params: Sequence[torch.Tensor], buckets: Sequence[Bucket], rank: int
    ) -> None:
        """See the class."""
        self._params, self._buckets, self._rank = params, buckets, rank

    def ready(self, index: int) -> None:
        """Nothing is to be done when a gradient arrives."""

    def finish(self) -> list[bool]:
        """Return which parameters have a gradient."""
        return [param.grad is not None for param in self._params]

    def sums(self, bucket: int) -> list[torch.Tensor]:
        """Sums of this rank's rows of each gradient: finite unless one of them is not."""
        return [
            slot.rows_of(grad, self._rank).sum()
            for slot in self._buckets[bucket].slots
            if (grad := self._params[slot.index].grad) is not None
        ]

    def gradient(self, bucket: int, slot: Slot) -> torch.Tensor:
        """This rank's rows of a gradient; zeros if only another rank has it."""
        param = self._params[slot.index]
        if param.grad is None:
            return torch.zeros_like(slot.rows_of(param.detach(), self._rank))
        return slot.rows_of(param.grad, self._rank)

    def clear(self) -> None:
        """Leave gradients to zero_grad."""
