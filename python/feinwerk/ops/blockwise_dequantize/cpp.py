"""blockwise_dequantize through the native extension."""

from __future__ import annotations

import torch

from feinwerk import _native


def blockwise_dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
    layout: str = "flat",
) -> torch.Tensor:
    """Forward to the native kernel."""
    return _native.blockwise_dequantize(codes, absmax, codebook, offset, blocksize, layout)
