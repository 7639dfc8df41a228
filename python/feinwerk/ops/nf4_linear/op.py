"""nf4_linear: checks, schemas, the gradient and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from feinwerk import _checks
from feinwerk._checks import FLOAT_DTYPES
from feinwerk._library import register_op
from feinwerk.ops.nf4_linear import cpp, reference


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> None:
    op = "nf4_linear"
    _checks.positive(op, "N", N)
    _checks.positive(op, "K", K)
    _checks.last_dim(op, "x", x, K, "K")
    device = x.device
    _checks.nf4_weight(
        op,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N * K,
        blocksize,
        device,
    )
    if bias is not None:
        _checks.floating(op, "bias", bias)
        if bias.dim() != 1 or bias.shape[0] != N:
            _checks.reject(ValueError, op, "bias", f"have shape ({N},)", tuple(bias.shape))
        _checks.same_device(op, "bias", bias, device)
    if compute not in ("exact", "int8"):
        _checks.reject(ValueError, op, "compute", 'be "exact" or "int8"', repr(compute))


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)


def _check_backward(
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
) -> None:
    op = "nf4_linear_backward"
    _checks.positive(op, "N", N)
    _checks.positive(op, "K", K)
    _checks.last_dim(op, "grad_y", grad_y, N, "N")
    _checks.nf4_weight(
        op,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N * K,
        blocksize,
        grad_y.device,
    )


def _fake_backward(
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
) -> torch.Tensor:
    return torch.empty((*grad_y.shape[:-1], K), dtype=grad_y.dtype, device=grad_y.device)


_OP = register_op(
    "nf4_linear",
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? bias=None, Tensor? nested_absmax=None, "
    "Tensor? nested_codebook=None, Tensor? nested_offset=None, *, SymInt N, SymInt K, "
    'int blocksize=64, str compute="exact") -> Tensor',
    check=_check,
    reference=reference.nf4_linear,
    cpp=cpp.nf4_linear,
    fake=_fake,
    triton="feinwerk.ops.nf4_linear.triton",
)

_BACKWARD_OP = register_op(
    "nf4_linear_backward",
    "(Tensor grad_y, Tensor packed, Tensor absmax, Tensor? nested_absmax=None, "
    "Tensor? nested_codebook=None, Tensor? nested_offset=None, *, SymInt N, SymInt K, "
    "int blocksize=64) -> Tensor",
    check=_check_backward,
    reference=reference.nf4_linear_backward,
    cpp=cpp.nf4_linear_backward,
    fake=_fake_backward,
    triton="feinwerk.ops.nf4_linear.triton",
)


class _Linear(torch.autograd.Function):
    """nf4_linear with gradients for x and bias; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        packed, absmax, bias, nested_absmax, nested_codebook, nested_offset = args[:6]
        N, K, blocksize, compute = args[6:]
        ctx.save_for_backward(packed, absmax, nested_absmax, nested_codebook, nested_offset)
        ctx.sizes = (N, K, blocksize)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: torch.Tensor = _OP(x, *args[:6], N=N, K=K, blocksize=blocksize, compute=compute)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        N, K, blocksize = ctx.sizes
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _BACKWARD_OP(
                grad_y.contiguous(), *ctx.saved_tensors, N=N, K=K, blocksize=blocksize
            )
        if ctx.needs_input_grad[3]:
            rows = grad_y.reshape(-1, N)
            grad_bias = rows.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None, None, None, None, None, None


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Multiply activations with a weight held in NF4: y = x @ W^T + bias.

    W~ = codebook[code] * absmax, rounded once to x's dtype; products accumulate in fp32, the bias
    is added in fp32 and y is rounded once. The weight is never expanded as a whole. Gradients flow
    to `x` (through the same W~) and to `bias`; the weight is frozen. Under autocast `x` is cast to
    the autocast dtype first.

    `compute="int8"` rounds the activations to 8 bits, one scale per 64 elements of K: faster for
    few rows, with the error written in docs/ops/nf4_linear.md. Its gradient is the exact op's.

    Args:
        x: [..., K], 1 to 4 dimensions, fp32, bf16 or fp16, zero rows allowed.
        packed: uint8, ceil(N * K / 2) elements in any shape, contiguous.
        absmax: fp32 [ceil(N * K / blocksize)], or uint8 codes with the three nested tensors.
        bias: [N], fp32, bf16 or fp16, or None.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        N: out_features.
        K: in_features.
        blocksize: elements per absmax.
        compute: "exact" or "int8".

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size or device does not fit, `blocksize` or `compute` is unknown, or only
            some of the nested tensors are given.

    Source:
        QLoRA (arXiv 2305.14314), equations 5 and 6.

    Example:
        >>> from feinwerk import nf4_quantize
        >>> packed, absmax = nf4_quantize(torch.randn(8, 64))
        >>> nf4_linear(torch.randn(3, 64), packed, absmax, N=8, K=64).shape
        torch.Size([3, 8])
    """
    _checks.tensor("nf4_linear", "x", x)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOAT_DTYPES:
        x = x.to(torch.get_autocast_dtype(device))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x,
            packed,
            absmax,
            bias,
            nested_absmax,
            nested_codebook,
            nested_offset,
            N,
            K,
            blocksize,
            compute,
        )
        return y
    y = _OP(
        x,
        packed,
        absmax,
        bias,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N=N,
        K=K,
        blocksize=blocksize,
        compute=compute,
    )
    return y


def nf4_linear_backward(
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
) -> torch.Tensor:
    """Return the gradient of `nf4_linear` for its x: grad_x = grad_y @ W.

    W~ is the forward's, rounded once to grad_y's dtype; products accumulate in fp32. `nf4_linear`
    calls it; call it yourself only to write another op's backward. It has no gradient itself.

    Args:
        grad_y: [..., N], 1 to 4 dimensions, fp32, bf16 or fp16.
        packed: uint8, ceil(N * K / 2) elements in any shape, contiguous.
        absmax: fp32 [ceil(N * K / blocksize)], or uint8 codes with the three nested tensors.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        N: out_features.
        K: in_features.
        blocksize: elements per absmax.

    Returns:
        grad_x [..., K] in grad_y's dtype.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size or device does not fit, `blocksize` is unknown, or only some of the
            nested tensors are given.

    Source:
        QLoRA (arXiv 2305.14314), section 3.

    Example:
        >>> from feinwerk import nf4_quantize
        >>> packed, absmax = nf4_quantize(torch.randn(8, 64))
        >>> nf4_linear_backward(torch.randn(3, 8), packed, absmax, N=8, K=64).shape
        torch.Size([3, 64])
    """
    _checks.tensor("nf4_linear_backward", "grad_y", grad_y)
    grad_x: torch.Tensor = _BACKWARD_OP(
        grad_y.detach(),
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        nested_offset,
        N=N,
        K=K,
        blocksize=blocksize,
    )
    return grad_x
