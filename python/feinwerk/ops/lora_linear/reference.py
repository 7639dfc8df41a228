"""What lora_linear and its gradient mean, in plain torch with fp32 arithmetic."""

from __future__ import annotations

import torch

from feinwerk.ops.nf4_linear.reference import round_activations
from feinwerk.ops.weight_norm.reference import factored_norm, rounded_weight
from feinwerk.philox import keep_mask

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
    """y, S = dropout(x) A^T of every row, and the norms that the DoRA adapters used."""
    N, K = lora_B[0].shape[0], lora_A[0].shape[1]
    nested = (nested_absmax, nested_codebook, nested_offset)
    W = rounded_weight(weight, absmax, *nested, shape=(N, K), blocksize=blocksize, dtype=x.dtype)
    rows = x.reshape(-1, K).float()
    dropped = drop(rows, seed, dropout_p)
    S = rows.new_zeros(len(rows), max(A.shape[0] for A in lora_A))
    norms = rows.new_zeros(len(lora_A) if magnitude else 0, N)
    with torch.autocast(x.device.type, enabled=False):
        base = (round_activations(rows) if compute == "int8" else rows) @ W.t()
        # Two sums: of x, and of what DoRA scales. They differ only under dropout.
        y = base
        scaled = base if dropout_p == 0 or not magnitude else dropped @ W.t()
        gain = torch.ones_like(y) if magnitude else None
        delta = torch.zeros_like(y)
        for i, (begin, end) in enumerate(row_ranges(segments, len(rows))):
            A, B = lora_A[i].float(), lora_B[i].float()
            S[begin:end, : len(A)] = dropped[begin:end] @ A.t()
            delta[begin:end] = scaling[i].float() * S[begin:end, : len(A)] @ B.t()
            if magnitude and magnitude[i].numel():
                assert gain is not None
                if weight_norm is None:
                    assert base_norm is not None
                    norms[i] = factored_norm(W, A, B, scaling[i].float(), base_norm)
                norm = norms[i] if weight_norm is None else weight_norm[i]
                gain[begin:end] = gain_of(magnitude[i], norm)
        y = y + delta
        if gain is not None:
            y = gain * y if dropout_p == 0 else y + (gain - 1) * (scaled + delta)
    if bias is not None:
        y = y + bias.float()
    known = weight_norm is not None or not magnitude
    # Not a view: autograd forbids in-place operations on a view that a Function returns.
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    out.view(-1, N).copy_(y)
    return out, S, norms[:0] if known else norms


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
    nested = (nested_absmax, nested_codebook, nested_offset)
    W = rounded_weight(weight, absmax, *nested, shape=(N, K), blocksize=blocksize, dtype=x.dtype)
    rows, dy = x.reshape(-1, K).float(), grad_y.reshape(-1, N).float()
    dropped = drop(rows, seed, dropout_p)
    grad_A: Tensors = []
    grad_B: Tensors = []
    grad_magnitude: Tensors = []
    gain = torch.ones_like(dy)
    through_S = torch.zeros_like(rows)
    with torch.autocast(x.device.type, enabled=False):
        for i, (begin, end) in enumerate(row_ranges(segments, len(rows))):
            A, B, s = lora_A[i].float(), lora_B[i].float(), scaling[i].float()
            part, kept = dy[begin:end], S[begin:end, : len(A)]
            g = part.new_ones(N)
            if magnitude and magnitude[i].numel():
                assert weight_norm is not None
                g = gain_of(magnitude[i], weight_norm[i])
                gain[begin:end] = g
                inner = dropped[begin:end] @ W.t() + s * kept @ B.t()
                inverse = torch.where(weight_norm[i] > 0, 1 / weight_norm[i], 0.0)
                grad_magnitude.append((inverse * (part * inner).sum(dim=0)).to(magnitude[i].dtype))
            elif magnitude:
                grad_magnitude.append(torch.zeros_like(magnitude[i]))
            dS = s * part @ (g[:, None] * B)
            through_S[begin:end] += dS @ A
            grad_A.append((dS.t() @ dropped[begin:end]).to(lora_A[i].dtype))
            grad_B.append((s * g[:, None] * (part.t() @ kept)).to(lora_B[i].dtype))
        if dropout_p == 0 or not magnitude:
            grad_x = (gain * dy) @ W + drop(through_S, seed, dropout_p)
        else:
            grad_x = dy @ W + drop(((gain - 1) * dy) @ W + through_S, seed, dropout_p)
    return (
        grad_x.to(x.dtype).view(x.shape) if wants[0] else x.new_zeros(0),
        grad_A if wants[1] else [],
        grad_B if wants[2] else [],
        grad_magnitude if wants[3] else [],
        dy.sum(dim=0) if wants[4] else rows.new_zeros(0),
    )


def row_ranges(segments: torch.Tensor | None, rows: int) -> list[tuple[int, int]]:
    """The rows [begin, end) of every adapter; all of them without segments."""
    if segments is None:
        return [(0, rows)]
    return [(begin, end) for begin, end in segments.tolist()]


def drop(x: torch.Tensor, seed: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
    """Dropout with the mask of `seed`."""
    if seed is None or dropout_p == 0:
        return x
    keep = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x, 0.0) / (1 - dropout_p)


def gain_of(magnitude: torch.Tensor, weight_norm: torch.Tensor) -> torch.Tensor:
    """Return magnitude / weight_norm; a row of norm zero has no direction and gets 0."""
    return torch.where(weight_norm > 0, magnitude.float() / weight_norm, 0.0)
