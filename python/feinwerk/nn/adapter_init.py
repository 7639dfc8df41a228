"""The first values of A and B: random ones with B A = 0, or parts of W that the base then gives up.

```
   "default"        A kaiming-uniform (a = sqrt 5), B = 0                       base as it is
   "gaussian"       A normal with deviation 1 / r, B = 0                        base as it is
   "orthogonal"     A and B normal over orthogonal halves: B A = 0, both nonzero base as it is
   "pissa"          s B A = the r largest singular directions of W              base W - s B A
   "pissa_niter_n"  the same by a randomized SVD with n power iterations        base W - s B A
   "olora"          B A = the first r directions of the QR decomposition of W   base W - s B A
   "loftq"          s B A = best rank-r fit of W - Q, Q = NF4(W - s B A), in turns        base Q
```
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.merge import merged_weight, store
from feinwerk.weight import NF4Weight

_NITER = re.compile(r"pissa_niter_(\d+)")
# These take A and B out of W, so that there must be r directions, and change the base.
TAKES_FROM_BASE = ("pissa", "olora", "loftq")

Factors = tuple[torch.Tensor, torch.Tensor]


def family(init: str) -> str:
    """Return the name without the number of iterations: "pissa" for "pissa_niter_4"."""
    return "pissa" if isinstance(init, str) and _NITER.fullmatch(init) else init


def initialise(
    init: str,
    weight: torch.Tensor | NF4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    iterations: int = 1,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | NF4Weight | None]:
    """Return A and B, and what the base is to hold; None where it stays as it is.

    The rest is taken of A and B as they are stored, so that rest + scaling B A is W again up to
    the rounding (or, over NF4, the quantization) of the rest.

    Args:
        init: one of the names above.
        weight: the base's weight.
        lora_A: gives shape and dtype.
        lora_B: gives shape and dtype.
        scaling: of the adapter.
        iterations: of LoftQ.
        transposed: whether `weight` is held as [K, N].

    Returns:
        (A, B, rest).

    Source:
        LoRA (arXiv 2106.09685) 4.1, PiSSA (2404.02948) 3, OLoRA (2406.01775) 3, LoftQ (2310.08659)
        algorithm 1; the orthogonal one: PEFT's documentation.
    """
    r = lora_A.shape[0]
    A = torch.empty(lora_A.shape, device=lora_A.device)
    B = torch.zeros(lora_B.shape, device=lora_B.device)
    if init == "default":
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5)), B, None
    if init == "gaussian":
        return nn.init.normal_(A, std=1 / r), B, None
    if init == "orthogonal":
        return *_orthogonal(r, A.shape[1], B.shape[0], A.device), None
    with torch.no_grad():
        if init == "loftq":
            assert isinstance(weight, torch.Tensor)
            rest, A, B = loftq(
                weight.t() if transposed else weight, r, scaling=scaling, iterations=iterations,
                dtype=lora_A.dtype,
            )  # fmt: skip
            return A, B, rest
        W = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()
        W = W.t() if transposed else W
        if init == "olora":
            Q, R = torch.linalg.qr(W)
            A, B = R[:r], Q[:, :r]
        else:
            niter = _NITER.fullmatch(init)
            A, B = _largest(W, r, scaling, None if niter is None else int(niter[1]))
        A, B = A.to(lora_A.dtype), B.to(lora_B.dtype)
        exact = merged_weight(weight, A, B, scaling=-scaling, transposed=transposed)
        return A, B, store(exact, weight if isinstance(weight, NF4Weight) else weight.dtype)[0]


def loftq(
    weight: torch.Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    iterations: int = 1,
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[NF4Weight, torch.Tensor, torch.Tensor]:
    """Quantize a weight together with the adapter that makes up best for what quantizing loses.

        Q_t = NF4(W - s B_{t-1} A_{t-1}),    s B_t A_t = best rank-r fit of W - Q_t,    B_0 A_0 = 0

    Args:
        weight: dense [N, K].
        r: rank, at most the smaller of N and K.
        scaling: s of the adapter; PEFT leaves it out, which is the same for lora_alpha = r.
        iterations: rounds of the two.
        blocksize: elements per absmax.
        double_quant: also quantize absmax.
        dtype: of A and B.

    Returns:
        (the NF4 weight, A [r, K], B [N, r]).

    Raises:
        ValueError: if r, iterations or blocksize breaks its rule or the weight is not finite.

    Source:
        LoftQ (arXiv 2310.08659), algorithm 1.

    Example:
        >>> W = torch.randn(16, 64)
        >>> Q, A, B = loftq(W, 4)
        >>> bool((Q.dequantize() + B @ A - W).norm() < (Q.dequantize() - W).norm())
        True
    """
    op = "loftq"
    _checks.floating(op, "weight", weight)
    _checks.positive(op, "iterations", iterations)
    if weight.dim() != 2:
        _checks.reject(ValueError, op, "weight", "have shape (N, K)", tuple(weight.shape))
    if not 1 <= r <= min(weight.shape):
        _checks.reject(ValueError, op, "r", f"be in [1, {min(weight.shape)}]", r)
    with torch.no_grad():
        W = weight.detach().float()
        rest = W
        for _ in range(iterations):
            quantized = NF4Weight.from_dense(rest, blocksize=blocksize, double_quant=double_quant)
            lost = W - quantized.dequantize(torch.float32)
            A, B = (factor.to(dtype) for factor in _largest(lost, r, scaling, None))
            rest = merged_weight(W, A, B, scaling=-scaling)
    return quantized.to(dtype=weight.dtype), A, B


def _largest(W: torch.Tensor, r: int, scaling: float, niter: int | None) -> Factors:
    """A and B with scaling B A the best rank-r fit of W, the singular values shared evenly."""
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.t()
    # A negative scaling goes to A's sign.
    root = (S[:r] / abs(scaling)).sqrt()
    return math.copysign(1.0, scaling) * root[:, None] * Vh[:r], U[:, :r] * root


def _orthogonal(r: int, K: int, N: int, device: torch.device) -> Factors:
    """A in the span of the even rows of an orthogonal matrix, B in that of the odd ones."""
    Q = torch.linalg.qr(torch.randn(r, r, device=device))[0]
    A = (torch.randn(K, r // 2, device=device) @ Q[0::2]).t() / 10
    B = torch.randn(r // 2, N, device=device).t() @ Q[1::2] / 10
    return A, B
