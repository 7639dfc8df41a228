"""The adapter ops of the C core: tensors to addresses, outputs and the workspace allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feinwerk._native import _C, _COMPUTES, _DTYPES, _NO_ADDRESS, _empty, _scratch, _Weight
from feinwerk.philox import threshold

Tables = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Base:
    """The C view of a frozen weight, NF4 or dense; holds the tensors whose addresses it names."""

    __slots__ = ("fields", "held")

    def __init__(self, tables: Tables, N: int, K: int, blocksize: int) -> None:
        weight, absmax, *nested = tables
        self.held: object
        if absmax is not None:
            packed = _Weight(weight, absmax, (nested[0], nested[1], nested[2]), N, K, blocksize)
            self.held = packed
            self.fields = (packed.fields, _NO_ADDRESS, 0)
        else:
            weight = weight.contiguous()
            self.held = weight
            none = (N, K, blocksize, 0, 0, 0, 0, 0, 0, 0, 0, 0)
            self.fields = (none, weight.data_ptr(), _DTYPES[weight.dtype])


def _floats(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return _NO_ADDRESS if tensor is None else tensor.data_ptr()


class _Adapters:
    """The C view of all adapters: fp32 copies of what is not fp32, rows, norms and gradients."""

    def __init__(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scaling: Tensor,
        segments: Tensor | None,
        magnitude: Sequence[Tensor],
        rows: int,
    ) -> None:
        self.A = [_floats(A) for A in lora_A]
        self.B = [_floats(B) for B in lora_B]
        self.magnitude = [_floats(m) if m.numel() else None for m in magnitude]
        self.magnitude += [None] * (len(lora_A) - len(magnitude))
        self.scaling: list[float] = scaling.tolist()
        self.ranges = [[0, rows]] if segments is None else segments.tolist()
        self.N, self.K = lora_B[0].shape[0], lora_A[0].shape[1]
        self.widest = max(A.shape[0] for A in lora_A)

    def fields(
        self,
        base_norm: Tensor | None,
        norms: Tensor | None,
        known: bool,
        gradients: Sequence[Sequence[Tensor]] = ((), (), ()),
    ) -> list[tuple[int, int, int, float, int, int, int, int, int, bool, int, int, int]]:
        """One tuple an adapter; norms [adapters, N] are read when known, else written."""
        result = []
        for i, (A, B, m) in enumerate(zip(self.A, self.B, self.magnitude, strict=True)):
            norm = None if m is None or norms is None else norms[i]
            grads = [
                _address(part[i]) if part and part[i].numel() else _NO_ADDRESS for part in gradients
            ]
            result.append(
                (
                    A.shape[0], A.data_ptr(), B.data_ptr(), self.scaling[i], *self.ranges[i],
                    _address(m), _address(base_norm), _address(norm), known, *grads,
                )
            )  # fmt: skip
        return result


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[int, int, float]:
    if seed is None or dropout_p == 0:
        return 0, 0, 1.0
    return int(seed) & 0xFFFFFFFFFFFFFFFF, threshold(dropout_p), 1 / (1 - dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: Tensor,
    segments: Tensor | None,
    magnitude: list[Tensor],
    base_norm: Tensor | None,
    weight_norm: Tensor | None,
    seed: Tensor | None,
    *,
    dropout_p: float = 0.0,
    blocksize: int = 64,
    compute: str = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [..., N], S [M, widest r] and the norms [adapters, N] that were found."""
    x = x.contiguous()
    rows = math.prod(x.shape[:-1])
    adapters = _Adapters(lora_A, lora_B, scaling, segments, magnitude, rows)
    N = adapters.N
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    base = _Base(tables, N, adapters.K, blocksize)
    y = _empty((*x.shape[:-1], N), x.dtype)
    S = _empty((rows, adapters.widest), torch.float32)
    if min(A.shape[0] for A in lora_A) < adapters.widest or segments is not None:
        S.zero_()  # what belongs to no adapter
    known = weight_norm is not None
    finds = bool(magnitude) and not known
    norms = _empty((len(lora_A) if finds else 0, N), torch.float32)
    if finds and segments is not None:
        norms.zero_()  # rows of LoRA adapters
    if base_norm is not None:
        base_norm = base_norm.contiguous()
    weight_norm = weight_norm.contiguous() if weight_norm is not None else norms
    bias = None if bias is None else bias.contiguous()
    fields = adapters.fields(base_norm, weight_norm, known)
    _scratch.run(
        lambda address, size: _C.lora_linear(
            base.fields, x.data_ptr(), y.data_ptr(), _DTYPES[x.dtype], rows, _address(bias),
            0 if bias is None else _DTYPES[bias.dtype], _COMPUTES[compute], fields, S.data_ptr(),
            adapters.widest, *_dropout(seed, dropout_p), address, size, torch.get_num_threads(),
        )
    )  # fmt: skip
    return y, S, norms


def lora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    S: Tensor,
    y: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: Tensor,
    segments: Tensor | None,
    magnitude: list[Tensor],
    weight_norm: Tensor | None,
    seed: Tensor | None,
    *,
    dropout_p: float = 0.0,
    blocksize: int = 64,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Gradients of x, every A, B and magnitude, and bias; empty where `wants` says no."""
    grad_y, x, S = grad_y.contiguous(), x.contiguous(), S.contiguous()
    rows = math.prod(x.shape[:-1])
    adapters = _Adapters(lora_A, lora_B, scaling, segments, magnitude, rows)
    N = adapters.N
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    base = _Base(tables, N, adapters.K, blocksize)
    gradients = [
        [_empty(t.shape, torch.float32) for t in part] if wanted else []
        for part, wanted in zip((lora_A, lora_B, magnitude), wants[1:4], strict=True)
    ]
    grad_x = _empty(x.shape if wants[0] else 0, x.dtype)
    grad_bias = _empty(N if wants[4] else 0, torch.float32)
    y = None if y is None else y.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight_norm = None if weight_norm is None else weight_norm.contiguous()
    fields = adapters.fields(None, weight_norm, True, gradients)
    _scratch.run(
        lambda address, size: _C.lora_linear_backward(
            base.fields, grad_y.data_ptr(), x.data_ptr(), _address(y), _DTYPES[x.dtype], rows,
            _address(bias), 0 if bias is None else _DTYPES[bias.dtype], fields, S.data_ptr(),
            adapters.widest, *_dropout(seed, dropout_p),
            grad_x.data_ptr() if wants[0] else _NO_ADDRESS,
            grad_bias.data_ptr() if wants[4] else _NO_ADDRESS, address, size,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    A, B, m = (
        [gradient.to(like.dtype) for gradient, like in zip(part, likes, strict=False)]
        for part, likes in zip(gradients, (lora_A, lora_B, magnitude), strict=True)
    )
    return grad_x, A, B, m, grad_bias


def weight_norm(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    base_norm: Tensor,
    *,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """fp32 [N]: the product of no rows at all, which finds the norms of its adapter."""
    adapters = _Adapters([lora_A], [lora_B], scaling.reshape(1), None, [], 0)
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    base = _Base(tables, adapters.N, adapters.K, blocksize)
    norm = _empty(adapters.N, torch.float32)
    base_norm = base_norm.contiguous()
    [fields] = adapters.fields(base_norm, None, False)
    fields = (*fields[:8], norm.data_ptr(), *fields[9:])
    _scratch.run(
        lambda address, size: _C.lora_linear(
            base.fields, _NO_ADDRESS, _NO_ADDRESS, _DTYPES[dtype], 0, _NO_ADDRESS, 0, 0, [fields],
            _NO_ADDRESS, adapters.widest, 0, 0, 1.0, address, size, torch.get_num_threads(),
        )
    )  # fmt: skip
    return norm
