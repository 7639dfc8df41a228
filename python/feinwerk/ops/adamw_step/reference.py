"""What adamw_step means, in plain torch: decode, update, encode, one rounding an operation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from feinwerk import philox
from feinwerk.codebook import dynamic_map

Tensors = Sequence[torch.Tensor]
_SMALLEST_NORMAL = 2.0**-126


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    remainders: Tensors,
    steps: Sequence[int],
    parameter_ids: Sequence[int],
    first_elements: Sequence[int],
    seed: torch.Tensor | None = None,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int = 256,
    maximize: bool = False,
) -> None:
    """Update every parameter and its states in place, unless `found_inf` is not zero."""
    if found_inf is not None and float(found_inf) != 0:
        return
    factor = torch.tensor(-1.0 if maximize else 1.0, dtype=torch.float32, device="cpu")
    if clip_coef is not None:
        factor = factor * clip_coef.float().cpu()
    if grad_scale is not None:
        factor = factor / grad_scale.float().cpu()
    weight1, decay1, weight2, floor = (
        torch.tensor(x, dtype=torch.float32, device="cpu")
        for x in (1 - beta1, beta2, 1 - beta2, eps)
    )
    for i, param in enumerate(params):
        step_size, correction, shrink = (
            torch.tensor(x, dtype=torch.float32, device="cpu")
            for x in (
                lr / (1 - beta1 ** steps[i]),
                1 / math.sqrt(1 - beta2 ** steps[i]),
                1 - lr * weight_decay,
            )
        )
        quantized = exp_avgs[i].dtype is torch.uint8
        if quantized:
            m = _decode(exp_avgs[i], exp_avg_absmaxes[i], blocksize, signed=True)
            v = _decode(exp_avg_sqs[i], exp_avg_sq_absmaxes[i], blocksize, signed=False)
        else:
            m, v = exp_avgs[i].float(), exp_avg_sqs[i].float()
        p = _joined(param, remainders[i]) if remainders else param.float()
        g = grads[i].float() * factor.item()
        m = m + (g - m) * weight1
        v = v * decay1 + (g * g) * weight2
        # In double: torch's own fp32 root is not always the nearest.
        root = v.double().sqrt().float()
        p = p * shrink - (m / (root * correction + floor)) * step_size
        if quantized:
            # A block in which a moment has overflowed starts afresh: infinity times the code of
            # zero would be NaN.
            most, most_sq = _absmax(m, blocksize), _absmax(v, blocksize)
            finite = most.isfinite() & most_sq.isfinite()
            exp_avg_absmaxes[i].view(finite.shape).copy_(torch.where(finite, most, 0.0))
            exp_avg_sq_absmaxes[i].view(finite.shape).copy_(torch.where(finite, most_sq, 0.0))
            _encode(m, exp_avgs[i], exp_avg_absmaxes[i], blocksize, signed=True)
            _encode(v, exp_avg_sqs[i], exp_avg_sq_absmaxes[i], blocksize, signed=False)
        else:
            exp_avgs[i].copy_(m)
            exp_avg_sqs[i].copy_(v)
        if remainders:
            _split(p, param, remainders[i])
        elif seed is not None and param.dtype is torch.bfloat16:
            row = (steps[i] << 32) + parameter_ids[i]
            param.copy_(_stochastically_rounded(p, seed, row, first_elements[i]))
        else:
            param.copy_(p)


def _blocks(x: torch.Tensor, blocksize: int) -> torch.Tensor:
    """View [rows, blocks a row, blocksize], rows padded with zeros; a vector is one row."""
    rows = x.shape[0] if x.dim() > 1 else 1
    length = x.numel() // max(1, rows)
    size = min(blocksize, max(1, length))
    padded = F.pad(x.reshape(rows, length), (0, -length % size))
    return padded.reshape(rows, -(-length // size), size)


def _flat(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo `_blocks`."""
    length = like.numel() // max(1, blocks.shape[0])
    return blocks.flatten(1)[:, :length].reshape(like.shape)


def _absmax(x: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Largest magnitude [rows, blocks a row]; NaN counts as zero."""
    return _blocks(torch.where(x.isnan(), 0.0, x.abs()), blocksize).amax(dim=2)


def _decode(
    codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, signed: bool
) -> torch.Tensor:
    blocks = _blocks(codes, blocksize)
    values = dynamic_map(signed, codes.device)[blocks.int()] * absmax.view(*blocks.shape[:2], 1)
    return _flat(values, codes)


def _encode(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, signed: bool
) -> None:
    """Nearest code, ties to the lower; NaN counts as zero; a positive v never becomes zero."""
    codebook = dynamic_map(signed, x.device)
    blocks = _blocks(x, blocksize)
    most = absmax.view(*blocks.shape[:2], 1)
    # Below the smallest normal number the reciprocal overflows: such a block is zero.
    usable = most >= _SMALLEST_NORMAL
    scaled = torch.where(usable, blocks * (1.0 / most), 0.0)
    scaled = torch.where(scaled.isnan(), 0.0, scaled)
    nearest = torch.bucketize(scaled, (codebook[:-1] + codebook[1:]) * 0.5)
    if not signed:
        nearest = torch.where(usable & (blocks > 0) & (nearest == 0), 1, nearest)
    codes.copy_(_flat(nearest, codes))


def _joined(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """fp32 whose upper half, rounded to nearest, is `high`, and whose lower half is `low`."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def _split(x: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    bits = torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32)).long()
    high.view(torch.int16).copy_((bits + 0x8000) >> 16)
    low.copy_(bits)


def _stochastically_rounded(
    x: torch.Tensor, seed: torch.Tensor, row: int, first: int
) -> torch.Tensor:
    """To the bf16 below or above, by the 16 high bits of the element's own random word."""
    words = philox.row_words(seed.to(x.device), row, first, x.numel()).view(x.shape)
    bits = x.contiguous().view(torch.int32).long()
    rounded = ((bits + (words >> 16)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)
