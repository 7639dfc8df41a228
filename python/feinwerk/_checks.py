"""The one form of every rejection, `<op>: <name> must <rule>, got <value>`, and the shared rules.

Nothing here reads tensor values, so that fakes, real tensors and symbolic sizes take the same path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from feinwerk.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, RULES

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = "be torch.float32, torch.bfloat16 or torch.float16"


def reject(error: type[Exception], op: str, name: str, rule: str, got: Any) -> NoReturn:
    """Raise `error` in the one message form."""
    raise error(f"{op}: {name} must {rule}, got {got}")


def tensor(op: str, name: str, value: Any) -> None:
    """Reject what is not a tensor before the dispatcher sees it."""
    if not isinstance(value, torch.Tensor):
        reject(TypeError, op, name, "be a torch.Tensor", type(value).__name__)


def floating(op: str, name: str, value: torch.Tensor) -> None:
    """Reject a tensor whose dtype is not one of the three activation dtypes."""
    if value.dtype not in FLOAT_DTYPES:
        reject(TypeError, op, name, FLOATS, value.dtype)


def out_dtype(op: str, dtype: torch.dtype) -> None:
    """Reject an output dtype that is not one of the three activation dtypes."""
    if dtype not in FLOAT_DTYPES:
        reject(TypeError, op, "dtype", FLOATS, dtype)


def blocksize(op: str, value: int) -> None:
    """Reject a blocksize that NF4 does not have."""
    if value not in BLOCKSIZES:
        reject(ValueError, op, "blocksize", f"be one of {', '.join(map(str, BLOCKSIZES))}", value)


def rule(op: str, value: str) -> None:
    """Reject an unknown quantizer rule."""
    if value not in RULES:
        reject(ValueError, op, "rule", 'be "cpu" or "cuda"', repr(value))


def layout(op: str, value: str) -> None:
    """Reject an unknown layout of blocks."""
    if value not in ("flat", "rows"):
        reject(ValueError, op, "layout", 'be "flat" or "rows"', repr(value))


def rows_of(shape: Sequence[int], layout: str = "rows") -> tuple[int, int]:
    """Return (rows, elements a row) that blocks do not cross.

    Rows lie along dimension 0; a vector, a number, and all in layout "flat", is one row.
    """
    if layout != "rows" or len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def positive(op: str, name: str, value: int) -> None:
    """Reject a size below 1."""
    if value < 1:
        reject(ValueError, op, name, "be at least 1", value)


def same_device(op: str, name: str, value: torch.Tensor, device: torch.device) -> None:
    """Reject a tensor that lives elsewhere than the op's first tensor."""
    if value.device != device:
        reject(ValueError, op, name, f"be on {device} like the other tensors", value.device)


def buffer(
    op: str, name: str, value: torch.Tensor, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    """Check a flat table: its dtype, exact number of elements, contiguity and device."""
    if value.dtype is not dtype:
        reject(TypeError, op, name, f"be {dtype}", value.dtype)
    if value.numel() != count:
        reject(ValueError, op, name, f"have {count} elements", value.numel())
    if not value.is_contiguous():
        reject(ValueError, op, name, "be contiguous", f"strides {tuple(value.stride())}")
    if value.device != device:
        same_device(op, name, value, device)


def last_dim(op: str, name: str, value: torch.Tensor, size: int, letter: str) -> None:
    """Check a 1-D to 4-D floating tensor whose last dimension is contracted with the weight."""
    if value.dtype not in FLOAT_DTYPES:
        reject(TypeError, op, name, FLOATS, value.dtype)
    if not 1 <= value.dim() <= 4:
        reject(ValueError, op, name, "have 1 to 4 dimensions", value.dim())
    if value.shape[-1] != size:
        reject(ValueError, op, name, f"have last dimension {letter} = {size}", tuple(value.shape))


def nf4_weight(
    op: str,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    count: int,
    block: int,
    device: torch.device,
    name: str = "packed",
) -> None:
    """Check the tensors of an NF4 weight of `count` elements in blocks of `block`."""
    if block not in BLOCKSIZES:
        blocksize(op, block)
    buffer(op, name, packed, torch.uint8, (count + 1) // 2, device)
    blocks = (count + block - 1) // block
    if nested_absmax is None and nested_codebook is None and nested_offset is None:
        if absmax.dtype is torch.uint8:
            reject(
                TypeError,
                op,
                "absmax",
                "be torch.float32, or torch.uint8 with nested_absmax, nested_codebook and "
                "nested_offset",
                "torch.uint8 without them",
            )
        buffer(op, "absmax", absmax, torch.float32, blocks, device)
        return
    if nested_absmax is None or nested_codebook is None or nested_offset is None:
        nested = {
            "nested_absmax": nested_absmax,
            "nested_codebook": nested_codebook,
            "nested_offset": nested_offset,
        }
        missing = ", ".join(name for name, value in nested.items() if value is None)
        reject(
            ValueError,
            op,
            missing,
            "be given together with the other nested tensors, or none of the three",
            "None",
        )
    buffer(op, "absmax", absmax, torch.uint8, blocks, device)
    nested_blocks = (blocks + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    buffer(op, "nested_absmax", nested_absmax, torch.float32, nested_blocks, device)
    buffer(op, "nested_codebook", nested_codebook, torch.float32, 256, device)
    if nested_offset.dim() != 0:
        reject(
            ValueError,
            op,
            "nested_offset",
            "be a 0-dim tensor",
            f"{nested_offset.dim()} dimensions",
        )
    buffer(op, "nested_offset", nested_offset, torch.float32, 1, device)
