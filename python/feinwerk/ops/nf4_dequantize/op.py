"""nf4_dequantize: check, schema and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.nf4_dequantize import cpp, reference


def _check(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> None:
    count = 1
    for size in shape:
        _checks.positive("nf4_dequantize", "shape", size)
        count *= size
    _checks.out_dtype("nf4_dequantize", dtype)
    _checks.nf4_weight(
        "nf4_dequantize",
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        count,
        blocksize,
        packed.device,
    )


def _fake(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    return torch.empty(list(shape), dtype=dtype, device=packed.device)


_OP = register_op(
    "nf4_dequantize",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax=None, Tensor? nested_codebook=None, "
    "Tensor? nested_offset=None, *, SymInt[] shape, int blocksize=64, "
    "ScalarType dtype=float) -> Tensor",
    check=_check,
    reference=reference.nf4_dequantize,
    cpp=cpp.nf4_dequantize,
    fake=_fake,
    triton="feinwerk.ops.nf4_dequantize.triton",
)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Turn NF4 codes back into a dense weight; exact, bit-equal on every backend.

        out_i = codebook[code_i] * absmax[i // blocksize]

    The product is taken in fp32 and rounded once to `dtype`. With double quantization
    `absmax` holds codes and is decoded on the way:

        absmax[b] = nested_codebook[codes[b]] * nested_absmax[b // 256] + nested_offset

    Use it to merge, inspect or convert a weight; to multiply with one, `nf4_linear` needs no
    dense copy.

    Args:
        packed: uint8, ceil(numel / 2) elements in any shape, contiguous.
        absmax: fp32 [ceil(numel / blocksize)], or uint8 codes with the three nested tensors.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        shape: the weight's shape, every size at least 1.
        blocksize: elements per absmax.
        dtype: fp32, bf16 or fp16 of the result.

    Returns:
        The dense weight, `shape`, `dtype`.

    Raises:
        TypeError: if a tensor or `dtype` has the wrong dtype.
        ValueError: if a size, device or `blocksize` does not fit, or only some of the nested
            tensors are given.

    Source:
        QLoRA (arXiv 2305.14314), section 3; docs/format.md, "Layout".

    Example:
        >>> from feinwerk import nf4_quantize
        >>> packed, absmax = nf4_quantize(torch.ones(2, 64))
        >>> nf4_dequantize(packed, absmax, shape=(2, 64)).sum()
        tensor(128.)
    """
    _checks.tensor("nf4_dequantize", "packed", packed)
    _checks.tensor("nf4_dequantize", "absmax", absmax)
    out: torch.Tensor = _OP(
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        shape=shape,
        blocksize=blocksize,
        dtype=dtype,
    )
    return out
