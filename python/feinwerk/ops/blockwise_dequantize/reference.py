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
    layout: str = "flat",
) -> torch.Tensor:
    """Look every code up, multiply by its block's absmax, then add the offset: two roundings."""
    rows = codes.reshape(codes.shape[0] if layout == "rows" and codes.dim() > 1 else 1, -1)
    length = rows.shape[1]
    size = min(blocksize, length)
    scales = absmax.reshape(len(rows), -1).repeat_interleave(size, dim=1)[:, :length]
    values = codebook[rows.int()] * scales
    if offset is not None:
        values = values + offset
    return values.view(codes.shape)
