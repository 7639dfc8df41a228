"""What nf4_linear and its gradient mean, in plain torch with fp32 arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from feinwerk.ops.nf4_dequantize.reference import nf4_dequantize

# compute="int8": elements of K that share one activation scale.
INT8_BLOCK = 64


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
    """Multiply with W~, the weight rounded once to x's dtype; add the bias in fp32; round once."""
    weight = nf4_dequantize(
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        shape=(N, K),
        blocksize=blocksize,
        dtype=x.dtype,
    )
    wide = x.float()
    if compute == "int8":
        wide = round_activations(wide)
    with torch.autocast(x.device.type, enabled=False):
        y = wide @ weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


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
    """Multiply with the same W~ from the other side."""
    weight = nf4_dequantize(
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        shape=(N, K),
        blocksize=blocksize,
        dtype=grad_y.dtype,
    )
    with torch.autocast(grad_y.device.type, enabled=False):
        return (grad_y.float() @ weight.float()).to(grad_y.dtype)


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Round each run of 64 elements of the last dimension to 255 steps of its largest |x|."""
    size = x.shape[-1]
    runs = (size + INT8_BLOCK - 1) // INT8_BLOCK
    blocks = F.pad(x, (0, -size % INT8_BLOCK)).view(*x.shape[:-1], runs, INT8_BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127.0
    steps = torch.where(scale > 0, blocks / scale, 0.0).round()
    rounded: torch.Tensor = (steps * scale).flatten(-2)[..., :size]
    return rounded
