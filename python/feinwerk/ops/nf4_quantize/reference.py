"""What nf4_quantize means, in plain torch: both rules to the bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from feinwerk.codebook import nf4_thresholds

# bitsandbytes' floor of the divisor; as fp32 it is the denormal 0x006ce3ee.
_TINY = 1e-38


def nf4_quantize(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize block by block: absmax, scale, compare with the 15 thresholds, pack."""
    if not allow_non_finite and not bool(weight.isfinite().all()):
        raise ValueError(
            "nf4_quantize: weight must be finite, got NaN or infinity; pass allow_non_finite=True "
            "to quantize it as bitsandbytes does"
        )
    flat = weight.reshape(-1).float()
    count = flat.numel()
    padding = -count % blocksize
    blocks = F.pad(flat, (0, padding)).view(-1, blocksize)
    scaled, absmax = (_scale_cpu if rule == "cpu" else _scale_cuda)(blocks, padding > 0)
    nan_code = 15 if rule == "cpu" else 0
    codes = torch.bucketize(scaled, nf4_thresholds(rule, flat.device), out_int32=True)
    codes = torch.where(scaled.isnan(), nan_code, codes).to(torch.uint8).view(-1)
    codes = codes[: count + count % 2]
    if count % 2 and rule == "cpu":
        codes[-1] = 7  # the padding is added after scaling: the code of 0.0
    return codes[::2] << 4 | codes[1::2], absmax


def _scale_cpu(blocks: torch.Tensor, partial: bool) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax.isnan(), torch.nan, absmax)  # one NaN, not the input's payload
    floor = absmax.clamp(min=_TINY)
    scaled = blocks * (1.0 / floor).unsqueeze(1)
    if partial:  # the last block divides, and keeps the floor as its absmax
        scaled[-1] = blocks[-1] / floor[-1]
        absmax[-1] = floor[-1]
    return scaled.clamp(-1, 1), absmax


def _scale_cuda(blocks: torch.Tensor, partial: bool) -> tuple[torch.Tensor, torch.Tensor]:
    del partial  # every block is treated alike
    absmax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(dim=1)
    return blocks * (1.0 / absmax).unsqueeze(1), absmax
