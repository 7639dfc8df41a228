"""The adapter functions lora_linear, dora_linear and grouped_lora_linear, over one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk import _checks
from feinwerk._checks import FLOAT_DTYPES
from feinwerk.ops.lora_linear import adapted_linear
from feinwerk.ops.weight_norm import row_norms

Scaling = float | torch.Tensor


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    scaling: Scaling = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Multiply with a frozen weight and a low-rank adapter: one op, one autograd node.

        y = x W^T + b + scaling (dropout(x) A^T) B^T + scaling lora_bias

    W~ is the weight rounded once to x's dtype; products accumulate in fp32 and y is rounded once.
    Gradients for x, A, B, bias and lora_bias; W is frozen. Kept for the backward: x itself,
    S = dropout(x) A^T [M, r] and the seed. Under autocast x is cast to the autocast dtype first.

    Args:
        x: [..., K], 1 to 4 dimensions, fp32, bf16 or fp16, zero rows allowed.
        weight: dense [N, K], or NF4's packed codes, uint8.
        lora_A: [r, K], fp32, bf16 or fp16.
        lora_B: [N, r], fp32, bf16 or fp16.
        bias: [N] or None.
        lora_bias: [N] or None.
        absmax: of an NF4 weight: fp32, or uint8 codes with the three nested tensors.
        nested_absmax: fp32 [ceil(len(absmax) / 256)].
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.
        scaling: a finite float or a 0-dim tensor (lora_alpha / r in PEFT).
        dropout_p: probability of dropping an element of x on the adapter's path; 0 outside
            training.
        seed: 0-dim int64 of the dropout mask; drawn from torch's default generator when it is not
            given, so that manual_seed and activation checkpointing reproduce it.
        blocksize: elements per absmax.
        compute: "exact", or "int8" over NF4 for activations rounded to 8 bits in the forward.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size, device or option does not fit, or scaling is not finite.

    Source:
        LoRA (arXiv 2106.09685), equation 3; QLoRA (arXiv 2305.14314), equation 5.

    Example:
        >>> lora_linear(torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.ones(2, 1))
        tensor([[3., 3.]])
    """
    op = "lora_linear"
    _tensors(op, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    scale = _scales(op, [scaling], x)
    if lora_bias is not None:
        _checks.floating(op, "lora_bias", lora_bias)
        if lora_bias.shape != lora_B.shape[:1]:
            rule = f"have shape {tuple(lora_B.shape[:1])}"
            _checks.reject(ValueError, op, "lora_bias", rule, tuple(lora_bias.shape))
        _checks.same_device(op, "lora_bias", lora_bias, x.device)
        extra = scale[0] * lora_bias.float()
        bias = extra if bias is None else bias.float() + extra
    return adapted_linear(
        _autocast(x), (weight, absmax, nested_absmax, nested_codebook, nested_offset), bias,
        [lora_A], [lora_B], scale, None, [], None, None, _seed(dropout_p, seed, x),
        dropout_p=dropout_p, blocksize=blocksize, compute=compute,
    )  # fmt: skip


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    base_norm: torch.Tensor | None = None,
    weight_norm: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Multiply with a frozen weight, a low-rank adapter and DoRA's magnitude, as PEFT defines it.

        g = magnitude / ||W + scaling B A||_row            (the norm is a constant for gradients)
        y = g (x W^T + scaling x A^T B^T) + b                                     without dropout
        y = x W^T + (g - 1) (x~ W^T) + g scaling x~ A^T B^T + b       with it, x~ = dropout(x)

    The norm is taken in the same pass over W as the product. The gradient of magnitude comes from
    the output that the next layer keeps anyway; it is recomputed in slabs where that output was
    changed in place, a magnitude is zero or the bias would swallow it.

    Args:
        x: [..., K], as in `lora_linear`.
        weight: dense [N, K], or NF4's packed codes, uint8.
        lora_A: [r, K].
        lora_B: [N, r].
        magnitude: [N].
        bias: [N] or None; not scaled.
        absmax: as in `lora_linear`, with the three that follow.
        nested_absmax: as in `lora_linear`.
        nested_codebook: as in `lora_linear`.
        nested_offset: as in `lora_linear`.
        base_norm: fp32 [N], `row_norms(weight)`: give it, or it is computed at every call.
        weight_norm: fp32 [N], a norm known to be right (inference); it is then not computed.
        scaling: a finite float or a 0-dim tensor.
        dropout_p: as in `lora_linear`.
        seed: as in `lora_linear`.
        blocksize: elements per absmax.
        compute: as in `lora_linear`.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size, device or option does not fit, or scaling is not finite.

    Source:
        DoRA (arXiv 2402.09353), equation 5 and section 4.3.

    Example:
        >>> W = torch.eye(2)
        >>> dora_linear(torch.ones(1, 2), W, torch.ones(1, 2), torch.zeros(2, 1), W.norm(dim=1))
        tensor([[1., 1.]])
    """
    op = "dora_linear"
    _tensors(op, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude)
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    N, K = _sizes(op, lora_A, lora_B)
    if magnitude.dim() != 1 or magnitude.shape[0] != N:
        _checks.reject(ValueError, op, "magnitude", f"have shape ({N},)", tuple(magnitude.shape))
    if weight_norm is not None and weight_norm.shape != (N,):
        _checks.reject(
            ValueError, op, "weight_norm", f"have shape ({N},)", tuple(weight_norm.shape)
        )
    if base_norm is None and weight_norm is None:
        base_norm = row_norms(*tables, shape=(N, K), blocksize=blocksize)
    return adapted_linear(
        _autocast(x), tables, bias, [lora_A], [lora_B], _scales(op, [scaling], x), None,
        [magnitude], base_norm, None if weight_norm is None else weight_norm.reshape(1, -1),
        _seed(dropout_p, seed, x), dropout_p=dropout_p, blocksize=blocksize, compute=compute,
    )  # fmt: skip


def grouped_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    adapter_index: torch.Tensor,
    bias: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    scaling: Sequence[Scaling],
    magnitude: Sequence[torch.Tensor | None] | None = None,
    base_norm: torch.Tensor | None = None,
    weight_norm: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Multiply a batch in which every row has its own LoRA or DoRA adapter, or none.

    Row m is what `lora_linear` or `dora_linear` gives it with adapter `adapter_index[m]`; ranks and
    scalings may differ, -1 means no adapter. The base product runs once for all. Gradients for x,
    bias and every A, B and magnitude.

    Args:
        x: [..., K], as in `lora_linear`.
        weight: dense [N, K], or NF4's packed codes, uint8.
        lora_A: one [r_i, K] an adapter.
        lora_B: one [N, r_i] an adapter.
        adapter_index: int64, the leading dimensions of x or its first one; -1 for no adapter.
        bias: [N] or None.
        absmax: as in `lora_linear`, with the three that follow.
        nested_absmax: as in `lora_linear`.
        nested_codebook: as in `lora_linear`.
        nested_offset: as in `lora_linear`.
        scaling: one an adapter.
        magnitude: one [N] for every DoRA adapter, None for LoRA; None when all are LoRA.
        base_norm: as in `dora_linear`.
        weight_norm: known norms, all or none of the DoRA adapters'.
        dropout_p: as in `lora_linear`.
        seed: as in `lora_linear`; rows are numbered once sorted by adapter.
        blocksize: elements per absmax.
        compute: as in `lora_linear`.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a size, device or option does not fit, or scaling is not finite.
        IndexError: if an adapter index is below -1 or too large.

    Source:
        Punica (arXiv 2310.18547), section 4, for the forward of LoRA; docs/ops/lora_linear.md.

    Example:
        >>> A, B = [torch.ones(1, 2)], [torch.ones(2, 1)]
        >>> index = torch.tensor([0, -1])
        >>> grouped_lora_linear(torch.ones(2, 2), torch.eye(2), A, B, index, scaling=[1.0])
        tensor([[3., 3.],
                [1., 1.]])
    """
    op = "grouped_lora_linear"
    _tensors(op, x=x, weight=weight, adapter_index=adapter_index)
    count = len(lora_A)
    if count == 0 or len(lora_B) != count or len(scaling) != count:
        lengths = f"{count}, {len(lora_B)} and {len(scaling)}"
        _checks.reject(ValueError, op, "lora_A, lora_B and scaling", "be as many", lengths)
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    for A, B in zip(lora_A, lora_B, strict=True):
        _tensors(op, lora_A=A, lora_B=B)
    N, K = _sizes(op, lora_A[0], lora_B[0])
    _checks.last_dim(op, "x", x, K, "K")
    magnitudes, norms = _dora_parts(op, magnitude, weight_norm, count, N, x)
    if magnitudes and base_norm is None and norms is None:
        base_norm = row_norms(*tables, shape=(N, K), blocksize=blocksize)
    order, segments = _sorted_rows(op, adapter_index, x, count)
    rows = _autocast(x).reshape(-1, K)
    y = adapted_linear(
        rows if order is None else rows[order], tables, bias, list(lora_A), list(lora_B),
        _scales(op, scaling, x), segments, magnitudes, base_norm, norms,
        _seed(dropout_p, seed, x), dropout_p=dropout_p, blocksize=blocksize, compute=compute,
    )  # fmt: skip
    if order is not None:
        y = y[torch.argsort(order)]
    return y.view(*x.shape[:-1], N)


def _tensors(op: str, **values: object) -> None:
    for name, value in values.items():
        _checks.tensor(op, name, value)


def _sizes(op: str, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[int, int]:
    """N and K, which the adapter says."""
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        if value.dim() != 2:
            _checks.reject(ValueError, op, name, "have 2 dimensions", value.dim())
    return lora_B.shape[0], lora_A.shape[1]


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOAT_DTYPES:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _scales(op: str, scaling: Sequence[Scaling], x: torch.Tensor) -> torch.Tensor:
    """All scalings as one fp32 tensor; a float that is not finite is rejected here."""
    if all(isinstance(value, int | float) for value in scaling):
        for value in scaling:
            if not abs(float(value)) < float("inf"):
                _checks.reject(ValueError, op, "scaling", "be finite", value)
        if all(value == scaling[0] for value in scaling):
            # Made on the device: nothing is copied, and nobody waits.
            count = (len(scaling),)
            return torch.full(count, scaling[0], dtype=torch.float32, device=x.device)  # type: ignore[arg-type]
        return torch.tensor(scaling, dtype=torch.float32, device=x.device)
    parts = [torch.as_tensor(value, dtype=torch.float32, device=x.device) for value in scaling]
    for part in parts:
        if part.dim() != 0:
            rule = "be a float or a 0-dim tensor"
            _checks.reject(ValueError, op, "scaling", rule, f"{part.dim()} dimensions")
    return torch.stack([part.detach() for part in parts])


def _seed(dropout_p: float, seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if not dropout_p > 0:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)
    return seed


def _dora_parts(
    op: str,
    magnitude: Sequence[torch.Tensor | None] | None,
    weight_norm: Sequence[torch.Tensor | None] | None,
    count: int,
    N: int,
    x: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """One magnitude an adapter, empty for LoRA, and the known norms as one [count, N]."""
    if magnitude is None or all(m is None for m in magnitude):
        return [], None
    if len(magnitude) != count:
        _checks.reject(ValueError, op, "magnitude", f"have {count} entries", len(magnitude))
    none = torch.zeros(0, device=x.device)
    magnitudes = [none if m is None else m for m in magnitude]
    if weight_norm is None or all(norm is None for norm in weight_norm):
        return magnitudes, None
    if len(weight_norm) != count:
        _checks.reject(ValueError, op, "weight_norm", f"have {count} entries", len(weight_norm))
    for m, norm in zip(magnitude, weight_norm, strict=True):
        if norm is None and m is not None:
            rule = "be given for every DoRA adapter or for none"
            _checks.reject(ValueError, op, "weight_norm", rule, "None for some")
        if norm is not None and norm.shape != (N,):
            _checks.reject(ValueError, op, "weight_norm", f"have shape ({N},)", tuple(norm.shape))
    ones = torch.ones(N, device=x.device)
    return magnitudes, torch.stack([ones if norm is None else norm for norm in weight_norm])


def _sorted_rows(
    op: str, adapter_index: torch.Tensor, x: torch.Tensor, count: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The order that puts rows of one adapter together (None: they are), and each one's range."""
    leading = x.shape[:-1]
    if adapter_index.dtype is not torch.int64:
        _checks.reject(TypeError, op, "adapter_index", "be torch.int64", adapter_index.dtype)
    if adapter_index.shape != leading[: adapter_index.dim()]:
        rule = f"have shape {tuple(leading)} or ({leading[0] if leading else ''},)"
        _checks.reject(ValueError, op, "adapter_index", rule, tuple(adapter_index.shape))
    index = adapter_index.reshape(
        [*adapter_index.shape, *[1] * (len(leading) - adapter_index.dim())]
    )
    index = index.expand(leading).reshape(-1)
    # Rows of no adapter, of each, and of what is out of range on either side; read back at once.
    known = index.clamp(-2, count) + 2
    counts = torch.zeros(count + 3, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, known, torch.ones_like(known))
    ordered = (index[1:] >= index[:-1]).all()
    facts = torch.cat([counts, ordered.reshape(1)]).cpu()
    if facts[0] or facts[-2]:
        rule = f"be in [-1, {count})"
        got = f"{int(index.min())} to {int(index.max())}"
        _checks.reject(IndexError, op, "adapter_index", rule, got)
    order = None if facts[-1] else torch.argsort(index, stable=True)
    ends = torch.cumsum(facts[1:-2], 0)
    return order, torch.stack([ends[:-1], ends[1:]], dim=1)
