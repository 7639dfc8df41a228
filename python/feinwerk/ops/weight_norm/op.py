"""weight_norm: checks, schema and the public functions."""

from __future__ import annotations

import math

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.blockwise_dequantize import blockwise_dequantize
from feinwerk.ops.nf4_dequantize import nf4_dequantize
from feinwerk.ops.weight_norm import cpp, reference

_SLAB = 1 << 20  # elements of W in fp32 at a time


def _check(
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    base_norm: torch.Tensor,
    *,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> None:
    op = "weight_norm"
    _checks.out_dtype(op, dtype)
    _checks.floating(op, "lora_A", lora_A)
    _checks.floating(op, "lora_B", lora_B)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        _checks.reject(ValueError, op, "lora_A and lora_B", "be (r, K) and (N, r)", shapes)
    N, K = lora_B.shape[0], lora_A.shape[1]
    if absmax is not None:
        _checks.nf4_weight(
            op, weight, absmax, nested_absmax, nested_codebook, nested_offset, N * K, blocksize,
            weight.device, "weight",
        )  # fmt: skip
    else:
        _checks.floating(op, "weight", weight)
        if weight.dim() != 2 or weight.shape[0] != N or weight.shape[1] != K:
            rule = f"have shape (N, K) = ({N}, {K}) as lora_B and lora_A say"
            _checks.reject(ValueError, op, "weight", rule, tuple(weight.shape))
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B), ("base_norm", base_norm)):
        _checks.same_device(op, name, value, weight.device)
    if scaling.dtype != torch.float32 or scaling.dim() != 0:
        got = f"{scaling.dtype} with {scaling.dim()} dimensions"
        _checks.reject(ValueError, op, "scaling", "be a float or a 0-dim tensor", got)
    if base_norm.dtype != torch.float32 or base_norm.dim() != 1 or base_norm.shape[0] != N:
        rule = f"be float32 of shape ({N},)"
        got = f"{base_norm.dtype} {tuple(base_norm.shape)}"
        _checks.reject(ValueError, op, "base_norm", rule, got)


def _fake(weight: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    lora_B = args[5]
    assert isinstance(lora_B, torch.Tensor)
    return torch.empty((lora_B.shape[0],), dtype=torch.float32, device=weight.device)


_OP = register_op(
    "weight_norm",
    "(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_codebook, "
    "Tensor? nested_offset, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor base_norm, *, "
    "int blocksize=64, ScalarType dtype=float) -> Tensor",
    check=_check,
    reference=reference.weight_norm,
    cpp=cpp.weight_norm,
    fake=_fake,
    triton="feinwerk.ops.weight_norm.triton",
)


def weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    scaling: float | torch.Tensor = 1.0,
    base_norm: torch.Tensor | None = None,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the row norms of W + scaling B A without forming B A or a dense W.

        n_i = n0_i sqrt(1 + (2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T) / n0_i^2),  n0 = ||W_i||

    DoRA's norm: a constant for gradients (it has none here). Exactly `base_norm` where B is zero.
    A row of W that is zero takes the square root of the second term alone.

    Args:
        weight: dense [N, K], or NF4's packed codes, uint8.
        lora_A: [r, K].
        lora_B: [N, r].
        absmax: of an NF4 weight: fp32, or uint8 codes with the three nested tensors.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        scaling: a float or a 0-dim tensor.
        base_norm: fp32 [N], `row_norms(weight)`; computed when it is not given.
        blocksize: elements per absmax.
        dtype: what W is rounded to; default a dense weight's own, fp32 for NF4.

    Returns:
        fp32 [N].

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size does not fit.

    Source:
        DoRA (arXiv 2402.09353), section 4.3; the factored form: docs/ops/weight_norm.md.

    Example:
        >>> weight_norm(torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1))
        tensor([1., 1.])
    """
    for name, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        _checks.tensor("weight_norm", name, value)
    if absmax is None:
        _checks.floating("weight_norm", "weight", weight)
    tables = (absmax, nested_absmax, nested_codebook, nested_offset)
    if dtype is None:
        dtype = weight.dtype if absmax is None else torch.float32
    if base_norm is None:
        shape = (lora_B.shape[0], lora_A.shape[-1])
        base_norm = row_norms(weight, *tables, shape=shape, blocksize=blocksize, dtype=dtype)
    if isinstance(scaling, torch.Tensor):
        scale = scaling.detach().to(torch.float32)
    else:  # on the device at once: a copy from the host would wait, and no graph could capture it
        scale = torch.full((), scaling, dtype=torch.float32, device=weight.device)
    norm: torch.Tensor = _OP(
        weight.detach(), *tables, lora_A.detach(), lora_B.detach(), scale, base_norm,
        blocksize=blocksize, dtype=dtype,
    )  # fmt: skip
    return norm


def row_norms(
    weight: torch.Tensor,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    shape: tuple[int, int] | None = None,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the row norms of a weight alone, n0_i = ||W_i||, a slab of rows at a time.

    The bits are `torch.linalg.norm(W.float(), dim=1)`'s, so that DoRA's gain, magnitude / norm, is
    exactly 1 for a magnitude that was initialised so. Compute it once per frozen base.

    Args:
        weight: dense [N, K], or NF4's packed codes, uint8.
        absmax: of an NF4 weight, as the four that follow.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        shape: (N, K) of an NF4 weight.
        blocksize: elements per absmax.
        dtype: what W is rounded to; default a dense weight's own, fp32 for NF4.

    Returns:
        fp32 [N].

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size does not fit, or `shape` is missing for an NF4 weight.

    Source:
        DoRA (arXiv 2402.09353), equation 5.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    op = "row_norms"
    _checks.tensor(op, "weight", weight)
    if dtype is not None:
        _checks.out_dtype(op, dtype)
    if absmax is None:
        _checks.floating(op, "weight", weight)
        if weight.dim() != 2:
            _checks.reject(ValueError, op, "weight", "have 2 dimensions", weight.dim())
        N, K = weight.shape
        step = max(1, _SLAB // max(1, K))
        rounding = weight.dtype if dtype is None else dtype
        slabs = [weight[n : n + step].detach().to(rounding) for n in range(0, N, step)]
        return torch.cat([torch.linalg.norm(slab.float(), dim=1) for slab in slabs])
    if shape is None:
        _checks.reject(ValueError, op, "shape", "be given for an NF4 weight", "None")
    N, K = shape
    _checks.positive(op, "shape", min(N, K))
    _checks.nf4_weight(
        op, weight, absmax, nested_absmax, nested_codebook, nested_offset, N * K, blocksize,
        weight.device, "weight",
    )  # fmt: skip
    if nested_absmax is not None and nested_codebook is not None:
        absmax = blockwise_dequantize(
            absmax.reshape(-1), nested_absmax, nested_codebook, nested_offset
        )
    # Slabs begin where a block and a byte do.
    unit = 2 * blocksize // math.gcd(2 * blocksize, K)
    step = max(1, _SLAB // (unit * K)) * unit
    flat, norms = weight.detach().reshape(-1), []
    for n in range(0, N, step):
        rows = min(step, N - n)
        begin, end = n * K, (n + rows) * K
        slab = nf4_dequantize(
            flat[begin // 2 : -(-end // 2)], absmax[begin // blocksize : -(-end // blocksize)],
            shape=(rows, K), blocksize=blocksize, dtype=torch.float32 if dtype is None else dtype,
        )  # fmt: skip
        norms.append(torch.linalg.norm(slab.float(), dim=1))
    return torch.cat(norms)
