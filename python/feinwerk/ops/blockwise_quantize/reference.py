"""What blockwise_quantize means, in plain torch, and the one order of its mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def blockwise_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subtract the mean if asked, scale each block by its absmax, take the nearest code."""
    rows = x.reshape(x.shape[0] if layout == "rows" and x.dim() > 1 else 1, -1)
    offset = ordered_mean(x.reshape(-1)) if center else torch.zeros((), device=x.device)
    if center:
        rows = rows - offset
    length = rows.shape[1]
    size = min(blocksize, length)
    blocks = F.pad(rows, (0, -length % size)).reshape(-1, size)
    absmax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(dim=1)
    scaled = blocks * (1.0 / absmax).unsqueeze(1)
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    nan = scaled.isnan()
    if rule == "cpu":
        # bitsandbytes looks the code up by the nearest of 65,536 bins; it rounds the bin's number
        # with a fused multiply-add, which is exact in double before its one rounding.
        half = (scaled.clamp(-1, 1) + 1.0) * 0.5
        number = (half.double() * 65535.0 + 0.5).float()
        number = torch.where(nan, 0.0, number).trunc()
        scaled = (number + number) / _on(number, 65535.0) - 1.0
    codes = torch.bucketize(scaled, midpoints, out_int32=True)
    if rule == "cpu":
        codes = torch.where((absmax == 0).unsqueeze(1), 0, codes)
    else:
        codes = torch.where(nan, 0, codes)
    codes = codes.to(torch.uint8).view(len(rows), -1)[:, :length].reshape(x.shape)
    return codes.contiguous(), absmax.view(len(rows), -1) if layout == "rows" else absmax, offset


def ordered_mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of a vector, summed in torch's single-thread order on x86.

    Rows of 4 vectors of 8 lanes go through a cascade of 4 accumulators: `step` rows make one
    addend of the next level, and so on; leftovers stay on their level.
    """
    count = x.numel()
    lanes = 8 if count >= 8 else 1
    vectors = x[: count // lanes * lanes].view(-1, lanes)
    rows = vectors[: len(vectors) // 4 * 4].view(-1, 4 * lanes)
    step = 1 << max(4, (max(len(rows), 1) - 1).bit_length() // 4)
    levels = []
    for _ in range(3):
        groups = len(rows) // step
        levels.append(_chain(rows[groups * step :]))
        rows = _chain(rows[: groups * step].view(groups, step, 4 * lanes))
    total = _chain(torch.stack([*levels, _chain(rows)])).view(4, lanes)
    first = _chain(vectors[len(vectors) // 4 * 4 :], start=total[0])
    lane_sums = _chain(total[1:], start=first)
    tail = _chain(x[count // lanes * lanes :].view(-1, 1))
    return _chain(lane_sums.view(-1, 1), start=tail).view(()) / _on(x, count)


def _chain(addends: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """Add addends[..., i, :] one after the other, i ascending, from `start` or zero."""
    shape = (*addends.shape[:-2], addends.shape[-1])
    total = addends.new_zeros(shape) if start is None else start
    for addend in addends.unbind(-2):
        total = total + addend
    return total


def _on(like: torch.Tensor, divisor: float) -> torch.Tensor:
    """A divisor that CUDA divides by; by a number of Python's it multiplies with the reciprocal."""
    return torch.full((), divisor, dtype=like.dtype, device=like.device)
