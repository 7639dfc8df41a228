"""nf4_quantize through the native extension."""

from __future__ import annotations

import torch

from feinwerk import _native


def nf4_quantize(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward to the native kernel."""
    return _native.nf4_quantize(weight, blocksize, rule, allow_non_finite)
