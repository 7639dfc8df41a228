"""What nf4_dequantize means, in plain torch; the matmuls use its W~ as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk.codebook import NESTED_BLOCKSIZE, nf4_codebook


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
    """Look every code up, multiply by its block's absmax in fp32, round once to dtype."""
    count = 1
    for size in shape:
        count *= size
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]
    values = nf4_codebook(packed.device)[codes.int()]
    scales = decode_absmax(absmax, nested_absmax, nested_codebook, nested_offset)
    scales = scales.reshape(-1).repeat_interleave(blocksize)[:count]
    return (values * scales).to(dtype).view(list(shape))


def decode_absmax(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the fp32 absmax of the given blocks (all when None), undoing double quantization."""
    absmax = absmax.reshape(-1)
    if blocks is None:
        blocks = torch.arange(absmax.numel(), device=absmax.device)
    if nested_absmax is None or nested_codebook is None or nested_offset is None:
        return absmax[blocks]
    scales = nested_absmax.reshape(-1)[blocks // NESTED_BLOCKSIZE]
    return nested_codebook.reshape(-1)[absmax[blocks].int()] * scales + nested_offset
