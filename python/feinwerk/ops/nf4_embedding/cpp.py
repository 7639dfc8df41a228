"""nf4_embedding through the native extension."""

from __future__ import annotations

import torch

from feinwerk import _native


def nf4_embedding(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Forward to the native kernel."""
    return _native.nf4_embedding(
        indices,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N,
        K,
        blocksize,
        dtype,
    )
