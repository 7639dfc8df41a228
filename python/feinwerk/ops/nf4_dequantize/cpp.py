"""nf4_dequantize through the native extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk import _native


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Forward to the native kernel."""
    return _native.nf4_dequantize(
        packed, absmax, nested_absmax, nested_codebook, nested_offset, list(shape), blocksize, dtype
    )
