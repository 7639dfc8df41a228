"""nf4_linear and its gradient through the native extension."""

from __future__ import annotations

import torch

from feinwerk import _native


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Forward to the native kernel."""
    return _native.nf4_linear(
        x,
        packed,
        absmax,
        bias,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N,
        K,
        blocksize,
        compute,
    )


def nf4_linear_backward(
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
) -> torch.Tensor:
    """Forward to the native kernel."""
    return _native.nf4_linear_backward(
        grad_y, packed, absmax, nested_absmax, nested_codebook, nested_offset, N, K, blocksize
    )
