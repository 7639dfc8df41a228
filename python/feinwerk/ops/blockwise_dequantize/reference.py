"""What blockwise_dequantize means, in plain torch."""

from __future__ import annotations

import torch


def blockwise_dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
) -> torch.Tensor:
    """Look every code up, multiply by its block's absmax, then add the offset: two roundings."""
    scales = absmax.reshape(-1).repeat_interleave(blocksize)[: codes.numel()]
    values = codebook[codes.reshape(-1).int()] * scales
    if offset is not None:
        values = values + offset
    return values.view(codes.shape)
