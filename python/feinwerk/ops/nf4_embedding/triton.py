"""nf4_embedding in Triton: nf4_dequantize's kernel with rows that the indices name."""

from __future__ import annotations

import torch

from feinwerk.ops.nf4_dequantize.triton import gather_rows


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
    """Decode row indices[i] of W into out[i]; on a GPU a device assertion reports a bad index."""
    rows = indices.reshape(-1).contiguous()
    # The interpreter's tensors live on CPU, where a bad index is an exception.
    if rows.device.type == "cpu" and bool(((rows < 0) | (rows >= N)).any()):
        bad = rows[(rows < 0) | (rows >= N)][0]
        raise IndexError(f"nf4_embedding: indices must be in [0, {N}), got {int(bad)}")
    out = torch.empty((*indices.shape, K), dtype=dtype, device=indices.device)
    gather_rows(
        out.view(-1, K), rows, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        N=N, blocksize=blocksize,
    )  # fmt: skip
    return out
