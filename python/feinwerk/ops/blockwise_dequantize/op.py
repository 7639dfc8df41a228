"""blockwise_dequantize: check, schema and the public function."""

from __future__ import annotations

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.blockwise_dequantize import cpp, reference


def _check(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
    layout: str = "flat",
) -> None:
    op = "blockwise_dequantize"
    if codes.dtype is not torch.uint8:
        _checks.reject(TypeError, op, "codes", "be torch.uint8", codes.dtype)
    if codes.numel() < 1:
        _checks.reject(ValueError, op, "codes", "have at least one element", tuple(codes.shape))
    _checks.positive(op, "blocksize", blocksize)
    _checks.layout(op, layout)
    rows, length = _checks.rows_of(codes.shape, layout)
    blocks = rows * ((length + blocksize - 1) // blocksize)
    _checks.buffer(op, "absmax", absmax, torch.float32, blocks, codes.device)
    _checks.buffer(op, "codebook", codebook, torch.float32, 256, codes.device)
    if offset is not None:
        if offset.dim() != 0:
            _checks.reject(
                ValueError, op, "offset", "be a 0-dim tensor", f"{offset.dim()} dimensions"
            )
        _checks.buffer(op, "offset", offset, torch.float32, 1, codes.device)


def _fake(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
    layout: str = "flat",
) -> torch.Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


_OP = register_op(
    "blockwise_dequantize",
    "(Tensor codes, Tensor absmax, Tensor codebook, Tensor? offset=None, *, "
    'int blocksize=256, str layout="flat") -> Tensor',
    check=_check,
    reference=reference.blockwise_dequantize,
    cpp=cpp.blockwise_dequantize,
    fake=_fake,
    triton="feinwerk.ops.blockwise_dequantize.triton",
)


def blockwise_dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    blocksize: int = 256,
    layout: str = "flat",
) -> torch.Tensor:
    """Turn 8-bit codes back into fp32 values; exact, bit-equal on every backend.

        out_i = codebook[code_i] * absmax[block of i] + offset

    The product is rounded before the sum; without an offset nothing is added. It undoes
    `blockwise_quantize`.

    Args:
        codes: uint8, any shape, at least one element.
        absmax: fp32 [ceil(numel / blocksize)], or with rows [rows, ceil(row / blocksize)],
            contiguous.
        codebook: fp32 [256], contiguous.
        offset: fp32, 0-dim, or None.
        blocksize: elements per absmax, any positive number.
        layout: "flat", or "rows" where blocks do not cross dimension 0 (a vector is one row).

    Returns:
        fp32, the shape of `codes`.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size or device does not fit, `blocksize` is below 1 or `layout` neither.

    Source:
        8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.

    Example:
        >>> from feinwerk.codebook import dynamic_map
        >>> codes = torch.full((4,), 255, dtype=torch.uint8)
        >>> blockwise_dequantize(codes, torch.tensor([2.0]), dynamic_map())
        tensor([2., 2., 2., 2.])
    """
    _checks.tensor("blockwise_dequantize", "codes", codes)
    _checks.tensor("blockwise_dequantize", "absmax", absmax)
    _checks.tensor("blockwise_dequantize", "codebook", codebook)
    out: torch.Tensor = _OP(codes, absmax, codebook, offset, blocksize=blocksize, layout=layout)
    return out
