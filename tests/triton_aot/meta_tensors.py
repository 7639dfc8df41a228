"""META tensors as the ops take them: shapes and dtypes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)

# Opens the name of an input that is documented to run the reference on every GPU.
REFERENCE = "reference: "

# Of one op: name, arguments, keyword arguments, everywhere.
Rows = Iterator[tuple[str, tuple[Any, ...], dict[str, Any], bool]]
Nested = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(
    count: int, blocksize: int = 64, nested: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Nested]:
    """packed, absmax and the nested tables of an NF4 weight of `count` elements."""
    packed, blocks = meta((count + 1) // 2, dtype=torch.uint8), -(-count // blocksize)
    if not nested:
        return packed, meta(blocks), (None, None, None)
    tables = (meta(-(-blocks // 256)), meta(256), meta())
    return packed, meta(blocks, dtype=torch.uint8), tables


def base_of(N: int, K: int, base: Any, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """weight, absmax and the nested tables, of a dense weight for None."""
    if base is None:
        return (meta(N, K, dtype=dtype), None, None, None, None)
    packed, absmax, tables = weight(N * K, *base)
    return (packed, absmax, *tables)
