"""blockwise_quantize through the native extension."""

from __future__ import annotations

import torch

from feinwerk import _native


def blockwise_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward to the native kernel."""
    return _native.blockwise_quantize(x, codebook, blocksize, center, rule, layout)
