"""The fp32 master of a bf16 parameter, joined from its two halves and split into them."""

from __future__ import annotations

import torch

from feinwerk import _checks


def join_master(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master of a bf16 parameter: `(its bits << 16) + remainder`.

    Args:
        param: bf16, any shape.
        remainder: uint8 [*shape, 2], the bytes of an int16: `param_remainder` of `AdamW`.

    Returns:
        fp32 like `param`.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if `remainder` has another shape.

    Example:
        >>> param, remainder = split_master(torch.tensor([0.1, -3.0]))
        >>> join_master(param, remainder)
        tensor([ 0.1000, -3.0000])
    """
    op = "join_master"
    if param.dtype is not torch.bfloat16:
        _checks.reject(TypeError, op, "param", "be torch.bfloat16", param.dtype)
    if remainder.dtype is not torch.uint8:
        _checks.reject(TypeError, op, "remainder", "be torch.uint8", remainder.dtype)
    if remainder.shape != (*param.shape, 2):
        rule = f"have shape {(*param.shape, 2)}"
        _checks.reject(ValueError, op, "remainder", rule, tuple(remainder.shape))
    high = param.contiguous().view(torch.int16).int() << 16
    low = remainder.contiguous().view(torch.int16).squeeze(-1).int()
    return (high + low).view(torch.float32)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bf16 parameter, rounded to nearest, and the remainder that `join_master` adds.

    Args:
        master: fp32, any shape; NaN becomes one NaN.

    Returns:
        bf16 like `master`, and uint8 [*shape, 2].

    Raises:
        TypeError: if `master` is not fp32.

    Example:
        >>> split_master(torch.tensor([1.0]))
        (tensor([1.], dtype=torch.bfloat16), tensor([[0, 0]], dtype=torch.uint8))
    """
    if master.dtype is not torch.float32:
        _checks.reject(TypeError, "split_master", "master", "be torch.float32", master.dtype)
    bits = torch.where(master.isnan(), 0x7FC00000, master.contiguous().view(torch.int32)).long()
    # Half way goes up in magnitude, unlike torch's own rounding, and the remainder is -32768 then.
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    low = bits.to(torch.int16).unsqueeze(-1).contiguous().view(torch.uint8)
    return high, low
