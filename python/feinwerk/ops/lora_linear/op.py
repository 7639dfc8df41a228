"""lora_linear: checks, schemas, and the gradient. The public functions are in ops/adapters.py.

One op serves LoRA, DoRA and batches of many adapters: an adapter is (A, B, scaling), DoRA adds a
magnitude, and `segments` says which rows of x are whose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.lora_linear import cpp, reference

Tensors = list[torch.Tensor]
_WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_codebook, "
    "Tensor? nested_offset, Tensor? bias"
)
_ADAPTERS = "Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? segments, Tensor[] magnitude"


def _check_adapters(
    op: str,
    x: torch.Tensor,
    lora_A: Tensors,
    lora_B: Tensors,
    scaling: torch.Tensor,
    segments: torch.Tensor | None,
    magnitude: Tensors,
) -> None:
    count = len(lora_A)
    if count == 0 or len(lora_B) != count or len(magnitude) not in (0, count):
        lengths = f"{count}, {len(lora_B)} and {len(magnitude)}"
        _checks.reject(ValueError, op, "lora_A, lora_B and magnitude", "be as many", lengths)
    N, K = lora_B[0].shape[0], lora_A[0].shape[-1]
    for A, B in zip(lora_A, lora_B, strict=True):
        _checks.floating(op, "lora_A", A)
        _checks.floating(op, "lora_B", B)
        if A.dim() != 2 or A.shape[1] != K or A.shape[0] < 1:
            _checks.reject(ValueError, op, "lora_A", f"have shape (r, K = {K})", tuple(A.shape))
        if B.dim() != 2 or B.shape[0] != N or B.shape[1] != A.shape[0]:
            shape = f"have shape (N = {N}, r = {A.shape[0]})"
            _checks.reject(ValueError, op, "lora_B", shape, tuple(B.shape))
        _checks.same_device(op, "lora_A", A, x.device)
        _checks.same_device(op, "lora_B", B, x.device)
    for m in magnitude:
        _checks.floating(op, "magnitude", m)
        if m.dim() != 1 or m.shape[0] not in (0, N):
            _checks.reject(ValueError, op, "magnitude", f"have shape ({N},)", tuple(m.shape))
        _checks.same_device(op, "magnitude", m, x.device)
    if scaling.dtype != torch.float32 or scaling.dim() != 1 or scaling.shape[0] != count:
        got = f"{scaling.dtype} {tuple(scaling.shape)}"
        _checks.reject(ValueError, op, "scaling", f"be float32 of shape ({count},)", got)
    if segments is None:
        if count != 1:
            rule = "be given for more than one adapter"
            _checks.reject(ValueError, op, "segments", rule, "None")
    elif segments.dtype != torch.int64 or tuple(segments.shape) != (count, 2):
        rule = f"be int64 of shape ({count}, 2)"
        _checks.reject(ValueError, op, "segments", rule, tuple(segments.shape))


def _check_base(
    op: str,
    x: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    bias: torch.Tensor | None,
    N: int,
    K: int,
    blocksize: int,
) -> None:
    weight, absmax, codes, codebook, offset = tables
    assert weight is not None
    if absmax is not None:
        _checks.nf4_weight(
            op, weight, absmax, codes, codebook, offset, N * K, blocksize, x.device, "weight"
        )
    else:
        _checks.floating(op, "weight", weight)
        if weight.dim() != 2 or weight.shape[0] != N or weight.shape[1] != K:
            shape = f"have shape (N, K) = ({N}, {K}) as lora_B and lora_A say"
            _checks.reject(ValueError, op, "weight", shape, tuple(weight.shape))
        _checks.same_device(op, "weight", weight, x.device)
    if bias is not None:
        _checks.floating(op, "bias", bias)
        if bias.dim() != 1 or bias.shape[0] != N:
            _checks.reject(ValueError, op, "bias", f"have shape ({N},)", tuple(bias.shape))
        _checks.same_device(op, "bias", bias, x.device)


def _check_norm(
    op: str, name: str, norm: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor
) -> None:
    if norm is None:
        return
    fits = norm.dim() == len(shape) and all(a == b for a, b in zip(norm.shape, shape, strict=True))
    if norm.dtype != torch.float32 or not fits:
        got = f"{norm.dtype} {tuple(norm.shape)}"
        _checks.reject(ValueError, op, name, f"be float32 of shape {shape}", got)
    _checks.same_device(op, name, norm, x.device)


def _check_dropout(op: str, seed: torch.Tensor | None, dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        _checks.reject(ValueError, op, "dropout_p", "be in [0, 1)", dropout_p)
    if dropout_p > 0 and (seed is None or seed.dtype != torch.int64 or seed.dim() != 0):
        _checks.reject(ValueError, op, "seed", "be a 0-dim int64 tensor for dropout_p > 0", seed)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_A: Tensors,
    lora_B: Tensors,
    scaling: torch.Tensor,
    segments: torch.Tensor | None,
    magnitude: Tensors,
    base_norm: torch.Tensor | None,
    weight_norm: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    dropout_p: float = 0.0,
    blocksize: int = 64,
    compute: str = "exact",
) -> None:
    op = "lora_linear"
    _check_adapters(op, x, lora_A, lora_B, scaling, segments, magnitude)
    N, K = lora_B[0].shape[0], lora_A[0].shape[1]
    _checks.last_dim(op, "x", x, K, "K")
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    _check_base(op, x, tables, bias, N, K, blocksize)
    _check_norm(op, "base_norm", base_norm, (N,), x)
    _check_norm(op, "weight_norm", weight_norm, (len(lora_A), N), x)
    if magnitude and base_norm is None and weight_norm is None:
        _checks.reject(ValueError, op, "base_norm", "be given with magnitude", "None")
    _check_dropout(op, seed, dropout_p)
    if compute not in ("exact", "int8"):
        _checks.reject(ValueError, op, "compute", 'be "exact" or "int8"', repr(compute))
    if compute == "int8" and absmax is None:
        _checks.reject(ValueError, op, "compute", 'be "exact" for a dense weight', repr(compute))


def _fake(
    x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_A, lora_B, magnitude, weight_norm = args[6], args[7], args[10], args[12]
    N = lora_B[0].shape[0]
    rows = x.numel() // x.shape[-1]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    widest = max(A.shape[0] for A in lora_A)
    S = torch.empty((rows, widest), dtype=torch.float32, device=x.device)
    fresh = len(lora_A) if magnitude and weight_norm is None else 0
    return y, S, torch.empty((fresh, N), dtype=torch.float32, device=x.device)


def _check_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    S: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_codebook: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_A: Tensors,
    lora_B: Tensors,
    scaling: torch.Tensor,
    segments: torch.Tensor | None,
    magnitude: Tensors,
    weight_norm: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    dropout_p: float = 0.0,
    blocksize: int = 64,
    wants: list[bool],
) -> None:
    op = "lora_linear_backward"
    _check_adapters(op, x, lora_A, lora_B, scaling, segments, magnitude)
    N, K = lora_B[0].shape[0], lora_A[0].shape[1]
    _checks.last_dim(op, "x", x, K, "K")
    _checks.last_dim(op, "grad_y", grad_y, N, "N")
    if grad_y.dtype != x.dtype or grad_y.shape[:-1] != x.shape[:-1]:
        rule = f"be {x.dtype} with the rows of x"
        _checks.reject(ValueError, op, "grad_y", rule, f"{grad_y.dtype} {tuple(grad_y.shape)}")
    kept = (math.prod(x.shape[:-1]), max(A.shape[0] for A in lora_A))
    if S.dtype != torch.float32 or tuple(S.shape) != kept:
        rule = f"be float32 of shape {kept}"
        _checks.reject(ValueError, op, "S", rule, f"{S.dtype} {tuple(S.shape)}")
    if y is not None and (y.dtype != grad_y.dtype or y.shape != grad_y.shape):
        rule = "be like grad_y"
        _checks.reject(ValueError, op, "y", rule, f"{y.dtype} {tuple(y.shape)}")
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    _check_base(op, x, tables, bias, N, K, blocksize)
    _check_norm(op, "weight_norm", weight_norm, (len(lora_A), N), x)
    if magnitude and weight_norm is None:
        _checks.reject(ValueError, op, "weight_norm", "be given with magnitude", "None")
    _check_dropout(op, seed, dropout_p)
    if len(wants) != 5:
        _checks.reject(ValueError, op, "wants", "have 5 entries", len(wants))


def _fake_backward(
    grad_y: torch.Tensor, x: torch.Tensor, *args: Any, wants: list[bool], **kwargs: Any
) -> tuple[torch.Tensor, Tensors, Tensors, Tensors, torch.Tensor]:
    lora_A, lora_B, magnitude = args[8], args[9], args[12]
    grad_x = torch.empty(x.shape if wants[0] else (0,), dtype=x.dtype, device=x.device)
    bias = torch.empty((grad_y.shape[-1] if wants[4] else 0,), dtype=torch.float32, device=x.device)
    return (
        grad_x,
        [torch.empty(A.shape, dtype=A.dtype, device=A.device) for A in lora_A if wants[1]],
        [torch.empty(B.shape, dtype=B.dtype, device=B.device) for B in lora_B if wants[2]],
        [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in magnitude if wants[3]],
        bias,
    )


_OP = register_op(
    "lora_linear",
    f"(Tensor x, {_WEIGHT}, {_ADAPTERS}, Tensor? base_norm, Tensor? weight_norm, Tensor? seed, *, "
    'float dropout_p=0.0, int blocksize=64, str compute="exact") '
    "-> (Tensor y, Tensor S, Tensor norms)",
    check=_check,
    reference=reference.lora_linear,
    cpp=cpp.lora_linear,
    fake=_fake,
    triton="feinwerk.ops.lora_linear.triton",
)

_BACKWARD_OP = register_op(
    "lora_linear_backward",
    f"(Tensor grad_y, Tensor x, Tensor S, Tensor? y, {_WEIGHT}, {_ADAPTERS}, "
    "Tensor? weight_norm, Tensor? seed, *, float dropout_p=0.0, int blocksize=64, bool[] wants) "
    "-> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B, Tensor[] grad_magnitude, "
    "Tensor grad_bias)",
    check=_check_backward,
    reference=reference.lora_linear_backward,
    cpp=cpp.lora_linear_backward,
    fake=_fake_backward,
    triton="feinwerk.ops.lora_linear.triton",
)


class _AdaptedLinear(torch.autograd.Function):
    """Gradients for x, bias, every A, B and magnitude; W, scaling and the norms are constants.

    Saved: x, S, the seed and the adapters; y only where a magnitude needs its gradient without
    dropout, and only as memory that the next layer keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, count: int, fixed: tuple[Any, ...], options: dict[str, Any], *tensors: Any
    ) -> torch.Tensor:
        x, bias = tensors[:2]
        A, B, m = (list(tensors[2 + i * count : 2 + (i + 1) * count]) for i in range(3))
        tables, scaling, segments, base_norm, weight_norm, seed = fixed
        y: torch.Tensor
        y, S, norms = _OP(
            x, *tables, bias, A, B, scaling, segments, m, base_norm, weight_norm, seed, **options
        )
        ctx.count, ctx.options = count, options
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = ctx.witness = None
        if m and options["dropout_p"] == 0 and any(t.requires_grad for t in m):
            kept, ctx.witness = _alias(y)
            ctx.version = 0 if ctx.witness is None else ctx.witness._version
        norm = weight_norm if weight_norm is not None else (norms if m else None)
        ctx.save_for_backward(x, S, kept, *tables, bias, scaling, segments, norm, seed, *A, *B, *m)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, S, y, *rest = ctx.saved_tensors
        tables, (bias, scaling, segments, norm, seed), lists = rest[:5], rest[5:10], rest[10:]
        count, needs = ctx.count, ctx.needs_input_grad[3:]
        A, B, m = (lists[i * count : (i + 1) * count] for i in range(3))
        if ctx.witness is not None and ctx.witness._version != ctx.version:
            y = None  # somebody has changed the output in place: recompute it slab by slab
        at = [slice(2 + i * count, 2 + (i + 1) * count) for i in range(3)]
        wants = [needs[0], *(any(needs[part]) for part in at), needs[1]]
        options = {k: v for k, v in ctx.options.items() if k != "compute"}
        grad_x, grad_A, grad_B, grad_m, grad_bias = _BACKWARD_OP(
            grad_y.contiguous(), x, S, y, *tables, bias, A, B, scaling, segments, m, norm, seed,
            **options, wants=wants,
        )  # fmt: skip
        none = [None] * count
        return (
            None,
            None,
            None,
            grad_x if needs[0] else None,
            grad_bias.to(ctx.bias_dtype) if needs[1] else None,
            *(grad_A or none),
            *(grad_B or none),
            *((grad_m or none) if m else ()),
        )


def _alias(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y's memory under a version counter of its own, and a witness of changes to y.

    Saving y itself would make an in-place operation after the layer an error. The witness shares
    y's version counter but holds no memory.
    """
    if torch.compiler.is_compiling():  # functionalized: nothing is changed in place
        return y, None
    witness = y.detach()
    alias = y.data
    witness.data = torch.empty(0, dtype=y.dtype, device=y.device)
    return alias, witness


def adapted_linear(
    x: torch.Tensor,
    tables: tuple[torch.Tensor | None, ...],
    bias: torch.Tensor | None,
    lora_A: Tensors,
    lora_B: Tensors,
    scaling: torch.Tensor,
    segments: torch.Tensor | None,
    magnitude: Tensors,
    base_norm: torch.Tensor | None,
    weight_norm: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    compute: str,
) -> torch.Tensor:
    """Run the op, under one autograd node where a gradient is needed."""
    options = {"dropout_p": dropout_p, "blocksize": blocksize, "compute": compute}
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, bias, *lora_A, *lora_B, *magnitude)
    ):
        y: torch.Tensor = _OP(
            x, *tables, bias, lora_A, lora_B, scaling, segments, magnitude, base_norm, weight_norm,
            seed, **options,
        )[0]  # fmt: skip
        return y
    fixed = (tables, scaling, segments, base_norm, weight_norm, seed)
    y = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        len(lora_A), fixed, options, x, bias, *lora_A, *lora_B, *magnitude
    )
    return y
