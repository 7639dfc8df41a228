"""lora_linear and its gradient in Triton: the frozen product slab by slab, adapters around it.

```
   forward    S = dropout(x) A^T                    shrink       one read of x
              y = x W~^T + b                        base         a slab of W at a time, and then,
              norms of the slab's rows              weight_norm  while it and its part of y are in
              y <- g (y - b + scaling S B^T) + b    expand       L2 (LoRA: y is filled beforehand)
   backward   dS, dB, sums for dm, g dY             grad_y       one read of dY (and y)
              dA = dS^T dropout(x)                  outer        one read of x
              dx <- keep dS A, += (g dY) W~         expand, base
```
Dropout's mask is drawn in registers wherever it is needed.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from feinwerk.ops.lora_linear.triton_base import Base
from feinwerk.ops.lora_linear.triton_expand import expand, masked, scale_columns
from feinwerk.ops.lora_linear.triton_grad_y import MOST_RANK, read_grad_y
from feinwerk.ops.lora_linear.triton_inner import magnitude_from_inner
from feinwerk.ops.lora_linear.triton_outer import (
    column_sums,
    magnitude_of_sums,
    outer,
    sums_over_y,
)  # fmt: skip
from feinwerk.ops.lora_linear.triton_shrink import shrink
from feinwerk.ops.weight_norm.triton import gram, norm_of_rows

Tensors = list[torch.Tensor]
_ROWS = torch.contiguous_format


def lora_linear(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, S and the norms that were found; "int8" is the reference's."""
    if compute != "exact":
        return NotImplemented
    count, N, K = len(lora_A), lora_B[0].shape[0], lora_A[0].shape[1]
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    base = Base(tables, N, K, blocksize, x.dtype)
    rows = x.detach().reshape(-1, K).contiguous()
    M, device = len(rows), x.device
    drawn = seed.to(device) if seed is not None and dropout_p > 0 else None
    p = dropout_p if drawn is not None else 0.0
    scaling, bias = scaling.to(device), None if bias is None else bias.detach().contiguous()
    magnitude = [m.detach().contiguous() for m in magnitude]
    dora = [bool(magnitude) and magnitude[i].numel() > 0 for i in range(count)]
    fresh = bool(magnitude) and weight_norm is None
    norms = None if weight_norm is None else weight_norm.contiguous()
    if fresh:
        make = torch.empty if all(dora) else torch.zeros
        norms = make((count, N), dtype=torch.float32, device=device)
    squares = [gram(A) if one and fresh else None for A, one in zip(lora_A, dora, strict=True)]
    base_norm = None if base_norm is None else base_norm.contiguous()

    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=device)
    flat = y.view(-1, N)
    make = torch.empty if segments is None else torch.zeros
    S = make((M, max(len(A) for A in lora_A)), dtype=torch.float32, device=device)
    ranges = row_ranges(segments, M)
    for A, (begin, end) in zip(lora_A, ranges, strict=True):
        shrink(S, rows, A.detach(), begin=begin, end=end, seed=drawn, dropout_p=p)
    dropped = masked(rows, drawn, p) if drawn is not None and any(dora) else None

    def adapt(
        part: torch.Tensor, first: int, slab: torch.Tensor | None, fresh_part: bool = False
    ) -> None:
        last, z = first + part.shape[1], None
        if dropped is not None:
            z = _second_product(base, dropped, slab, last - first)
        for i, (begin, end) in enumerate(ranges):
            gained = dora[i] and not fresh_part
            expand(
                part, S, lora_B[i].detach()[first:last].t(), begin=begin, end=end,
                scaling=scaling[i : i + 1], bias=None if bias is None else bias[first:last],
                magnitude=magnitude[i][first:last] if gained else None,
                norm=norms[i, first:last] if gained else None, z=z if gained else None,
                dropout_p=p, fresh=fresh_part,
            )  # fmt: skip

    # One adapter without DoRA: what it adds is there before the product, which then adds to it.
    ahead = segments is None and not any(dora)
    prepare = functools.partial(adapt, fresh_part=True) if ahead else None
    steps = base.products(rows, flat, bias, whole=fresh and any(dora), prepare=prepare)
    for first, last, slab, prepared in steps:
        for i in range(count):
            if dora[i] and fresh:
                norm_of_rows(
                    norms[i, first:last], slab, lora_A[i].detach(), lora_B[i].detach()[first:last],
                    squares[i], scaling[i : i + 1], base_norm[first:last],
                )  # fmt: skip
        if M and not prepared:
            adapt(flat[:, first:last], first, slab)
    return y, S, norms if fresh else torch.empty((0, N), dtype=S.dtype, device=S.device)


def _second_product(
    base: Base, dropped: torch.Tensor, slab: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """The product of the masked x with a slab, or with all of W where none is at hand."""
    z = torch.empty((len(dropped), columns), dtype=dropped.dtype, device=dropped.device)
    if slab is None:
        for _ in base.products(dropped, z, None, whole=False):
            pass
    elif len(dropped):
        torch.mm(dropped, slab.t(), out=z)
    return z


def lora_linear_backward(
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
) -> tuple[torch.Tensor, Tensors, Tensors, Tensors, torch.Tensor]:
    """Gradients of x, every A, B and magnitude, and bias; empty where `wants` says no."""
    N, K = lora_B[0].shape[0], lora_A[0].shape[1]
    tables = (weight, absmax, nested_absmax, nested_codebook, nested_offset)
    base = Base(tables, N, K, blocksize, x.dtype)
    rows, dy = x.detach().reshape(-1, K).contiguous(), grad_y.reshape(-1, N).contiguous()
    M, device, ranges = len(rows), x.device, row_ranges(segments, len(rows))
    drawn = seed.to(device) if seed is not None and dropout_p > 0 else None
    p = dropout_p if drawn is not None else 0.0
    scaling, S = scaling.to(device), S.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    weight_norm = None if weight_norm is None else weight_norm.contiguous()
    magnitude = [m.detach().contiguous() for m in magnitude]
    A, B = [one.detach() for one in lora_A], [one.detach() for one in lora_B]
    gains = [
        {"magnitude": magnitude[i], "norm": weight_norm[i]}
        if magnitude and weight_norm is not None and magnitude[i].numel()
        else {"magnitude": None, "norm": None}
        for i in range(len(A))
    ]
    spans = [{"begin": begin, "end": end} for begin, end in ranges]
    call = _Call(base, rows, dy, S, A, B, scaling, gains, spans, drawn, p)

    make = torch.empty if segments is None else torch.zeros
    dS = make(S.shape, dtype=torch.float32, device=device) if wants[0] or wants[1] else None
    grad_A = [_like(one) for one in A] if wants[1] else []
    grad_B = [_like(one) for one in B] if wants[2] else []
    seen = None
    if y is not None and drawn is None and wants[3]:
        seen = y.reshape(-1, N).contiguous()
    scaled, less = None, 0.0 if drawn is None else 1.0
    if wants[0] and any(call.dora):
        scaled = torch.empty_like(dy)
        if not all(call.dora) or sum(end - begin for begin, end in ranges) != M:
            scale_columns(scaled, dy, begin=0, end=M, magnitude=None, norm=None, less=less)
    sums = [
        _over_grad_y(
            call, i, dS=dS, grad_B=grad_B[i] if wants[2] else None, bias=bias,
            seen=seen if call.dora[i] else None, scaled=scaled if call.dora[i] else None, less=less,
        )
        for i in range(len(A))
    ]  # fmt: skip
    for i, out in enumerate(grad_A):
        outer(out, dS, rows, depth=N + M, seed=drawn, dropout_p=p, **spans[i])
    grad_bias = column_sums(dy) if wants[4] else _nothing(dy, torch.float32)
    grad_magnitude = _magnitudes(call, sums, bias, magnitude) if wants[3] and magnitude else []
    if not wants[0]:
        return _nothing(x, x.dtype), grad_A, grad_B, grad_magnitude, grad_bias
    grad_x = _grad_x(call, scaled, dS, covered=segments is None)
    return grad_x.view(x.shape), grad_A, grad_B, grad_magnitude, grad_bias


@dataclasses.dataclass(frozen=True)
class _Call:
    """What every part of the backward reads; lists have an entry for each adapter."""

    base: Base
    rows: torch.Tensor  # x [M, K]
    dy: torch.Tensor  # [M, N]
    S: torch.Tensor
    A: Tensors
    B: Tensors
    scaling: torch.Tensor
    gains: list[dict[str, torch.Tensor | None]]  # magnitude and norm, or Nones
    spans: list[dict[str, int]]  # begin and end of its rows
    seed: torch.Tensor | None
    dropout_p: float

    @property
    def dora(self) -> list[bool]:
        """Which adapters have a gain."""
        return [gain["norm"] is not None for gain in self.gains]


def _nothing(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((0,), dtype=dtype, device=like.device)


def _over_grad_y(
    call: _Call,
    i: int,
    *,
    dS: torch.Tensor | None,
    grad_B: torch.Tensor | None,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaled: torch.Tensor | None,
    less: float,
) -> torch.Tensor | None:
    """Whatever adapter i needs of dY: at once, or with many ranks one after the other."""
    dy, S, B, scaling = call.dy, call.S, call.B[i], call.scaling[i : i + 1]
    gain, span = call.gains[i], call.spans[i]
    (M, N), K = dy.shape, call.rows.shape[1]
    if B.shape[1] <= MOST_RANK:
        if all(wanted is None for wanted in (dS, grad_B, seen, scaled)):
            return None
        return read_grad_y(
            dy, S, B, scaling, depths=(N + M, K + M), dS=dS, grad_B=grad_B, y=seen, bias=bias,
            scaled=scaled, less=less, **span, **gain,
        )  # fmt: skip
    if dS is not None:
        shrink(dS, dy, B.t(), scaling=scaling, depth=N + M, **span, **gain)
    if grad_B is not None:
        outer(grad_B.t(), S, dy, depth=K + M, scaling=scaling, **span, **gain)
    if scaled is not None:
        scale_columns(scaled, dy, less=less, **span, **gain)
    return None if seen is None else sums_over_y(dy, seen, bias, **span)


def _grad_x(
    call: _Call, scaled: torch.Tensor | None, dS: torch.Tensor, *, covered: bool
) -> torch.Tensor:
    """(g dY) W~ + keep dS A; under dropout DoRA's second product is masked as well."""
    twice = scaled is not None and call.seed is not None
    dropout = {"seed": call.seed, "dropout_p": call.dropout_p}

    def prepare(part: torch.Tensor, first: int, slab: torch.Tensor | None) -> None:
        v = None
        if twice and slab is not None:
            v = torch.mm(scaled, slab, out=torch.empty_like(part, memory_format=_ROWS))
        if not covered:
            part.zero_()  # rows of no adapter
        for A, one, span in zip(call.A, call.dora, call.spans, strict=True):
            expand(
                part, dS, A[:, first : first + part.shape[1]], z=v if one else None, first=first,
                fresh=True, **dropout, **span,
            )  # fmt: skip

    through = call.dy if twice or scaled is None else scaled
    grad_x = call.base.transposed(through, prepare)
    if grad_x is None:
        grad_x = call.base.transposed_whole(through)
        v = call.base.transposed_whole(scaled) if twice else None
        for A, one, span in zip(call.A, call.dora, call.spans, strict=True):
            expand(grad_x, dS, A, z=v if one else None, **dropout, **span)
    return grad_x


def _magnitudes(
    call: _Call,
    sums: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    magnitude: Tensors,
) -> Tensors:
    """From the sums over y where it is there and says enough, else multiplied out again."""
    dropped = call.rows if call.seed is None else masked(call.rows, call.seed, call.dropout_p)
    found: Tensors = []
    for i, (span, parts) in enumerate(zip(call.spans, sums, strict=True)):
        lost, grad, norm = None, _like(magnitude[i]), call.gains[i]["norm"]
        if norm is not None:
            if parts is not None:
                count, dtype = span["end"] - span["begin"], call.dy.dtype
                grad, lost = magnitude_of_sums(parts, bias, magnitude[i], norm, count, dtype)
            magnitude_from_inner(
                grad, call.base, call.dy, dropped, call.S, call.B[i], call.scaling[i : i + 1], norm,
                lost=lost, keep_scale=1 / (1 - call.dropout_p), **span,
            )  # fmt: skip
        found.append(grad)
    return found


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def row_ranges(segments: torch.Tensor | None, rows: int) -> list[tuple[int, int]]:
    """The rows [begin, end) of every adapter; all of them without segments."""
    if segments is None:
        return [(0, rows)]
    return [(begin, end) for begin, end in segments.tolist()]
