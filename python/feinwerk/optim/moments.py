"""Moments of a parameter between 8-bit codes and fp32, with the codes that `adamw_step` gives."""

from __future__ import annotations

import torch

from feinwerk import _checks
from feinwerk.codebook import dynamic_map
from feinwerk.ops import blockwise_dequantize, blockwise_quantize
from feinwerk.optim.state import MOMENTS

_SMALLEST_NORMAL = 2.0**-126


def quantize_moment(
    name: str, values: torch.Tensor, blocksize: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a moment as 8-bit codes and the absmax of their blocks, which never cross a row.

        absmax[b] = max |value_i| over block b
        code_i    = nearest entry of the dynamic map to value_i / absmax[b], ties to the lower

    as `feinwerk.adamw_step` encodes them: a positive `exp_avg_sq` never takes the code of zero, NaN
    counts as zero, and a block with an infinity is zero.

    Args:
        name: "exp_avg" (signed map) or "exp_avg_sq" (unsigned).
        values: fp32, the parameter's shape; a vector is one row.
        blocksize: elements of a row per absmax.

    Returns:
        codes, uint8 like `values`; absmax, fp32 [rows, ceil(row / blocksize)].

    Raises:
        ValueError: if `name` is neither or `blocksize` is below 1.
        TypeError: if `values` is not fp32.

    Source:
        8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.

    Example:
        >>> codes, absmax = quantize_moment("exp_avg", torch.tensor([0.0, -0.5, 2.0]))
        >>> codes, absmax
        (tensor([127,  53, 255], dtype=torch.uint8), tensor([[2.]]))
    """
    signed = _is_signed("quantize_moment", name)
    _checks.positive("quantize_moment", "blocksize", blocksize)
    rows, row = _checks.rows_of(values.shape)
    blocks = -(-row // blocksize)
    if values.numel() == 0:
        empty = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        return empty, torch.zeros(rows, blocks, device=values.device)
    codebook = dynamic_map(signed, values.device)
    codes, absmax, _ = blockwise_quantize(
        values, codebook, blocksize=blocksize, rule="cuda", layout="rows"
    )
    # Below the smallest normal number the reciprocal overflows, and infinity times the code of zero
    # would be NaN: such a block is zero, as NaN itself is.
    absmax = torch.where(absmax.isfinite(), absmax, 0.0)
    usable = (absmax >= _SMALLEST_NORMAL).repeat_interleave(blocksize, dim=1)[:, :row]
    usable = usable.reshape(values.shape)
    zero = int((codebook == 0).nonzero())
    codes.masked_fill_(~usable | values.isnan(), zero)
    if not signed:
        codes.masked_fill_(usable & (values > 0) & (codes == 0), 1)
    return codes, absmax


def dequantize_moment(
    name: str, codes: torch.Tensor, absmax: torch.Tensor, blocksize: int = 256
) -> torch.Tensor:
    """Return the fp32 values that 8-bit codes stand for: `map[code] * absmax`, exact.

    Args:
        name: "exp_avg" or "exp_avg_sq".
        codes: uint8, the parameter's shape; a vector is one row.
        absmax: fp32 [rows, ceil(row / blocksize)].
        blocksize: elements of a row per absmax.

    Returns:
        fp32 like `codes`.

    Raises:
        ValueError: if `name` is neither, or a size does not fit.
        TypeError: if a tensor has the wrong dtype.

    Example:
        >>> codes, absmax = quantize_moment("exp_avg_sq", torch.tensor([4.0, 1.0]))
        >>> dequantize_moment("exp_avg_sq", codes, absmax)
        tensor([4.0000, 1.0047])
    """
    signed = _is_signed("dequantize_moment", name)
    _checks.positive("dequantize_moment", "blocksize", blocksize)
    if codes.numel() == 0:
        return torch.zeros(codes.shape, device=codes.device)
    codebook = dynamic_map(signed, codes.device)
    return blockwise_dequantize(codes, absmax, codebook, blocksize=blocksize, layout="rows")


def _is_signed(op: str, name: str) -> bool:
    if name not in MOMENTS:
        rule = f"be one of {', '.join(map(repr, MOMENTS))}"
        _checks.reject(ValueError, op, "name", rule, repr(name))
    return name == "exp_avg"
