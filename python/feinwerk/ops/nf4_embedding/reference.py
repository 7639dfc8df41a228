"""What nf4_embedding means, in plain torch; it decodes the asked rows only."""

from __future__ import annotations

import torch

from feinwerk.codebook import nf4_codebook
from feinwerk.ops.nf4_dequantize.reference import decode_absmax


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
    """Decode row indices[i] of W into out[i]."""
    rows = indices.long()
    # Elsewhere than on CPU the gather itself reports a bad index, without a synchronisation.
    if rows.device.type == "cpu" and bool(((rows < 0) | (rows >= N)).any()):
        bad = rows[(rows < 0) | (rows >= N)][0]
        raise IndexError(f"nf4_embedding: indices must be in [0, {N}), got {int(bad)}")
    elements = rows.unsqueeze(-1) * K + torch.arange(K, device=rows.device)
    pairs = packed.reshape(-1)[elements // 2]
    codes = torch.where(elements % 2 == 0, pairs >> 4, pairs & 15)
    scales = decode_absmax(
        absmax, nested_absmax, nested_codebook, nested_offset, elements // blocksize
    )
    return (nf4_codebook(packed.device)[codes.int()] * scales).to(dtype)
