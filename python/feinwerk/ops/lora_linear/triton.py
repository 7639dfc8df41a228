"""lora_linear and its gradient in Triton: the frozen product slab by slab, adapters around it.

```
   forward    S = dropout(x) A^T            shrink           one read of x
              y = x W~^T + b                base, a slab     then, while its part of y is in L2:
              norms of the slab's rows      weight_norm      DoRA
              y <- g (y - b + s S B^T) + b  expand
   backward   dS = s dY (g B)               shrink           one read of dY
              dA, dB, dm, db                outer            ordered sums over the rows
              dx = (g dY) W~ + keep dS A    base, expand
```
Dropout's mask is drawn in registers wherever it is needed.
"""

from __future__ import annotations

import torch

from feinwerk.ops.lora_linear.triton_base import Base
from feinwerk.ops.lora_linear.triton_expand import expand, masked, scale_columns
from feinwerk.ops.lora_linear.triton_inner import magnitude_from_inner
from feinwerk.ops.lora_linear.triton_outer import column_sums, magnitude_from_y, outer
from feinwerk.ops.lora_linear.triton_shrink import shrink
from feinwerk.ops.weight_norm.triton import gram, norm_of_rows

Tensors = list[torch.Tensor]


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
    scaling, bias = scaling.to(device), None if bias is None else bias.detach().contiguous()
    magnitude = [m.detach().contiguous() for m in magnitude]
    dora = [bool(magnitude) and magnitude[i].numel() > 0 for i in range(count)]
    fresh = bool(magnitude) and weight_norm is None
    norms = weight_norm
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
        shrink(S, rows, A.detach(), begin=begin, end=end, seed=drawn, dropout_p=dropout_p)
    dropped = masked(rows, drawn, dropout_p) if drawn is not None and any(dora) else None

    for first, last, slab in base.products(rows, flat, bias, whole=fresh and any(dora)):
        z = None
        if dropped is not None:
            z = _second_product(base, dropped, slab, last - first)
        for i, (begin, end) in enumerate(ranges):
            B, part = lora_B[i].detach()[first:last], scaling[i : i + 1]
            if dora[i] and fresh:
                norm_of_rows(
                    norms[i, first:last], slab, lora_A[i].detach(), B, squares[i], part,
                    base_norm[first:last],
                )  # fmt: skip
            if begin == end:
                continue
            expand(
                flat[:, first:last], S, B.t(), begin=begin, end=end, scaling=part,
                magnitude=magnitude[i][first:last] if dora[i] else None,
                norm=norms[i, first:last] if dora[i] else None,
                bias=None if bias is None else bias[first:last],
                z=z if dora[i] else None, dropout_p=dropout_p if drawn is not None else 0.0,
            )  # fmt: skip
    return y, S, norms if fresh else S.new_empty((0, N))


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
    magnitude = [m.detach().contiguous() for m in magnitude]
    A, B = [one.detach() for one in lora_A], [one.detach() for one in lora_B]
    gains = [
        {"magnitude": magnitude[i], "norm": weight_norm[i]}
        if magnitude and weight_norm is not None and magnitude[i].numel()
        else {"magnitude": None, "norm": None}
        for i in range(len(A))
    ]
    spans = [{"begin": begin, "end": end} for begin, end in ranges]

    dS = None
    if wants[0] or wants[1]:
        make = torch.empty if segments is None else torch.zeros
        dS = make(S.shape, dtype=torch.float32, device=device)
        for i, span in enumerate(spans):
            shrink(dS, dy, B[i].t(), scaling=scaling[i : i + 1], depth=N + M, **span, **gains[i])
    grad_A = [_like(one) for one in A] if wants[1] else []
    for i, out in enumerate(grad_A):
        outer(out, dS, rows, depth=N + M, seed=drawn, dropout_p=p, **spans[i])
    grad_B = [_like(one) for one in B] if wants[2] else []
    for i, out in enumerate(grad_B):
        outer(out.t(), S, dy, depth=K + M, scaling=scaling[i : i + 1], **spans[i], **gains[i])
    grad_bias = column_sums(dy) if wants[4] else dy.new_empty((0,), dtype=torch.float32)
    grad_magnitude = []
    if wants[3] and magnitude:
        grad_magnitude = _magnitudes(
            base, dy, rows, S, y, bias, B, scaling, gains, magnitude, drawn, p, spans
        )
    if not wants[0]:
        return x.new_empty((0,)), grad_A, grad_B, grad_magnitude, grad_bias
    grad_x = _grad_x(base, dy, dS, A, gains, drawn, p, spans)
    return grad_x.view(x.shape), grad_A, grad_B, grad_magnitude, grad_bias


def _grad_x(
    base: Base,
    dy: torch.Tensor,
    dS: torch.Tensor,
    A: Tensors,
    gains: list[dict[str, torch.Tensor | None]],
    seed: torch.Tensor | None,
    p: float,
    spans: list[dict[str, int]],
) -> torch.Tensor:
    """(g dY) W~ + keep dS A; under dropout DoRA's second product is masked as well."""
    dora = [gain["norm"] is not None for gain in gains]
    scaled, v = dy, None
    if any(dora):
        scaled, less = torch.empty_like(dy), 0.0 if seed is None else 1.0
        if sum(span["end"] - span["begin"] for span in spans) != len(dy) or not all(dora):
            everything = {"begin": 0, "end": len(dy)}
            scale_columns(scaled, dy, magnitude=None, norm=None, less=less, **everything)
        for i, span in enumerate(spans):
            if dora[i]:
                scale_columns(scaled, dy, less=less, **span, **gains[i])
        if seed is not None:
            scaled, v = dy, base.transposed(scaled)
    grad_x = base.transposed(scaled)
    for i, span in enumerate(spans):
        z = v if dora[i] else None
        expand(grad_x, dS, A[i], seed=seed, dropout_p=p, z=z, **span)
    return grad_x


def _magnitudes(
    base: Base,
    dy: torch.Tensor,
    rows: torch.Tensor,
    S: torch.Tensor,
    y: torch.Tensor | None,
    bias: torch.Tensor | None,
    B: Tensors,
    scaling: torch.Tensor,
    gains: list[dict[str, torch.Tensor | None]],
    magnitude: Tensors,
    seed: torch.Tensor | None,
    p: float,
    spans: list[dict[str, int]],
) -> Tensors:
    """From y where it is there and says enough, else multiplied out again."""
    bias = None if bias is None else bias.detach().contiguous()
    seen = None if y is None or seed is not None else y.reshape(-1, base.N).contiguous()
    dropped = rows if seed is None else masked(rows, seed, p)
    found: Tensors = []
    for i, span in enumerate(spans):
        lost, grad = None, _like(magnitude[i])
        norm = gains[i]["norm"]
        if norm is not None:
            if seen is not None:
                grad, lost = magnitude_from_y(dy, seen, bias, magnitude[i], norm, **span)
            magnitude_from_inner(
                grad, base, dy, dropped, S, B[i], scaling[i : i + 1], norm, lost=lost,
                keep_scale=1 / (1 - p), **span,
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
