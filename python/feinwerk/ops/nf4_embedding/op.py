"""nf4_embedding: check, schema and the public function."""

from __future__ import annotations

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.nf4_embedding import cpp, reference


def _check(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> None:
    op = "nf4_embedding"
    if indices.dtype not in (torch.int64, torch.int32):
        _checks.reject(TypeError, op, "indices", "be torch.int64 or torch.int32", indices.dtype)
    _checks.positive(op, "N", N)
    _checks.positive(op, "K", K)
    _checks.out_dtype(op, dtype)
    _checks.nf4_weight(
        op,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N * K,
        blocksize,
        indices.device,
    )


def _fake(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    return torch.empty((*indices.shape, K), dtype=dtype, device=indices.device)


_OP = register_op(
    "nf4_embedding",
    "(Tensor indices, Tensor packed, Tensor absmax, Tensor? nested_absmax=None, "
    "Tensor? nested_codebook=None, Tensor? nested_offset=None, *, SymInt N, SymInt K, "
    "int blocksize=64, ScalarType dtype=float) -> Tensor",
    check=_check,
    reference=reference.nf4_embedding,
    cpp=cpp.nf4_embedding,
    fake=_fake,
    triton="feinwerk.ops.nf4_embedding.triton",
)


def nf4_embedding(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Look rows up in a table held in NF4: out[i, :] = W[indices[i], :].

    Only the asked rows are decoded, exactly as `nf4_dequantize` would. The table is frozen:
    nothing here has a gradient.

    Args:
        indices: int64 or int32, any shape, each in [0, N).
        packed: uint8, ceil(N * K / 2) elements in any shape, contiguous.
        absmax: fp32 [ceil(N * K / blocksize)], or uint8 codes with the three nested tensors.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        N: rows of the table (num_embeddings).
        K: length of a row (embedding_dim).
        blocksize: elements per absmax.
        dtype: fp32, bf16 or fp16 of the result.

    Returns:
        [*indices.shape, K] in `dtype`.

    Raises:
        TypeError: if a tensor or `dtype` has the wrong dtype.
        ValueError: if a size or device does not fit, `blocksize` is unknown, or only some of the
            nested tensors are given.
        IndexError: if an index lies outside [0, N) (on CPU; elsewhere the device reports it).

    Source:
        QLoRA (arXiv 2305.14314), section 3; docs/format.md, "Layout".

    Example:
        >>> from feinwerk import nf4_quantize
        >>> packed, absmax = nf4_quantize(torch.randn(10, 64))
        >>> nf4_embedding(torch.tensor([3, 3, 9]), packed, absmax, N=10, K=64).shape
        torch.Size([3, 64])
    """
    _checks.tensor("nf4_embedding", "indices", indices)
    out: torch.Tensor = _OP(
        indices,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N=N,
        K=K,
        blocksize=blocksize,
        dtype=dtype,
    )
    return out
