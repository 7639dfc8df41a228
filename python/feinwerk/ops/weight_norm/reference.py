"""What weight_norm means, in plain torch with fp32 arithmetic."""

from __future__ import annotations

import torch

from feinwerk.ops.nf4_dequantize.reference import nf4_dequantize


def weight_norm(
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    base_norm: torch.Tensor,
    *,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The norms of the rows of W~ + scaling B A, W~ the weight rounded once to dtype."""
    shape = (lora_B.shape[0], lora_A.shape[1])
    nested = (nested_absmax, nested_codebook, nested_offset)
    W = rounded_weight(weight, absmax, *nested, shape=shape, blocksize=blocksize, dtype=dtype)
    with torch.autocast(weight.device.type, enabled=False):
        return factored_norm(W, lora_A.float(), lora_B.float(), scaling.float(), base_norm)


def factored_norm(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Return base sqrt(1 + (2 s (W A^T) . B + s^2 (B A A^T) . B) / base^2), row by row."""
    cross = ((W @ A.t()) * B).sum(dim=1)
    square = ((B @ (A @ A.t())) * B).sum(dim=1)
    change = 2 * scaling * cross + scaling * scaling * square
    relative = base * (1 + change / base / base).clamp(min=0).sqrt()
    return torch.where(base > 0, relative, change.clamp(min=0).sqrt())


def rounded_weight(
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    *,
    shape: tuple[int, int],
    blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W~, the weight rounded once to dtype, in fp32."""
    if absmax is None:
        return weight.to(dtype).float()
    nested = (nested_absmax, nested_codebook, nested_offset)
    return nf4_dequantize(
        weight, absmax, *nested, shape=shape, blocksize=blocksize, dtype=dtype
    ).float()
