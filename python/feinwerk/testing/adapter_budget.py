"""The fp64 truth of the adapter ops and the error budget of every output and gradient.

The truth is the formula in fp64, differentiated by torch's autograd: it shares no derivation with
the ops. docs/numerics.md states the budget.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from feinwerk.testing import WeightCase, int8_error, ulp

if TYPE_CHECKING:
    from feinwerk.testing.adapters import AdapterCase

U = 2.0**-24

# One rounding to bf16; what is left of an fp32 number that is split in two bf16 halves.
BF16_ROUNDING, BF16_SPLIT, FP16_ROUNDING = 2.0**-8, 2.0**-16, 2.0**-11

# The gradient of magnitude uses the saved y, rounded as it is, unless the gain is below the first
# or the bias beyond the second times the root mean square of y - bias.
LEAST_GAIN = 2.0**-10
MOST_BIAS = {torch.float32: 1024.0, torch.bfloat16: 4.0, torch.float16: 4.0}

Mix = tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float]


def norm_truth(
    weight: torch.Tensor,
    base_norm: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    *,
    split: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ||W + scaling B A|| row by row in fp64, factored, and the error that is allowed.

    The square is a sum of products, n0^2 + change, and is off by at most d = 4 sqrt(K + r) 2^-24
    times the sum of their sizes; the root is then off by at most d / (n + sqrt(n^2 - d)).

    Args:
        weight: W~ [N, K], in the dtype that the op rounds it to.
        base_norm: ||W|| [N].
        A: [r, K].
        B: [N, r].
        scaling: a float.
        split: the rows of A met W as two bf16 halves.

    Returns:
        (truth, error), fp64 [N].

    Example:
        >>> eye = torch.eye(2)
        >>> norm_truth(eye, torch.ones(2), torch.ones(1, 2), torch.zeros(2, 1), 1.0)[0]
        tensor([1., 1.], dtype=torch.float64)
    """
    W, A, B, n0 = weight.double(), A.double(), B.double(), base_norm.double()
    cross = ((W @ A.t()) * B).sum(dim=1)
    square = ((B @ (A @ A.t())) * B).sum(dim=1)
    truth = (n0 * n0 + 2 * scaling * cross + scaling**2 * square).clamp(min=0).sqrt()
    W, A, B = W.abs(), A.abs(), B.abs()
    cross = 2 * abs(scaling) * ((W @ A.t()) * B).sum(dim=1)
    square = scaling**2 * ((B @ (A @ A.t())) * B).sum(dim=1)
    error = 4 * math.sqrt(sum(A.shape)) * U * (n0 * n0 + cross + square)
    if split:
        error = error + BF16_SPLIT * cross
    root = truth + (truth * truth - error).clamp(min=0).sqrt()
    return truth, torch.where(root > 0, error / root, error.sqrt())


@functools.lru_cache(maxsize=4)
def gains(
    case: AdapterCase, split: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """(norm, its relative error, magnitude / norm) of every adapter, fp64 [N]; None for LoRA."""
    W, own = case.dense(case.x.dtype), case.dense().double().norm(dim=1)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = []
    for one in case.adapters:
        if one.magnitude is None:
            found.append(None)
            continue
        norm, error = norm_truth(W, own, one.A, one.B, one.s, split=split)
        gain = torch.where(norm > 0, one.magnitude.double() / norm, 0.0)
        found.append((norm, torch.where(norm > 0, error / norm, 0.0), gain))
    return found


def _formula(
    case: AdapterCase,
    leaves: dict[str, torch.Tensor],
    W: torch.Tensor,
    mixes: dict[int, Mix],
    scalings: Sequence[float],
) -> torch.Tensor:
    """Return y [M, N]: each adapter's rows are k0 x W^T + k1 x~ W^T + k2 s (x~ A^T) B^T + bias."""
    x = leaves["x"].reshape(-1, case.K)
    dropped = x * case.dropout_factor().to(x.dtype)
    base, through = x @ W.t(), dropped @ W.t()
    rows, y = case.rows_of()[:, None], torch.zeros_like(base)
    for i, (k0, k1, k2) in mixes.items():
        value = k0 * base + k1 * through
        if i >= 0:
            A, B = leaves[f"A{i}"], leaves[f"B{i}"]
            value = value + k2 * (scalings[i] * (dropped @ A.t()) @ B.t())
        y = torch.where(rows == i, value, y)
    if "bias" in leaves:
        y = y + leaves["bias"]
    if "lora_bias" in leaves:
        y = y + scalings[0] * leaves["lora_bias"]
    return y


def _mix(kind: str, gain: torch.Tensor, exact: torch.Tensor, dropout: bool) -> Mix:
    """A DoRA adapter's k0, k1, k2; `gain` is the leaf that they are differentiated for."""
    if not dropout:
        return (gain, 0.0, gain)
    offset = -1.0 if kind == "value" else ((exact - 1).abs() - exact.abs()).to(gain.dtype)
    return (1.0, gain + offset, gain)


def _differentiated(case: AdapterCase, dtype: torch.dtype, kind: str) -> dict[str, torch.Tensor]:
    """Return y and its gradients by name, in dtype, in one of two kinds.

    value   the formula itself
    size    the formula of absolute values: each result is the sum of |terms| of the exact one
    """
    plain = kind == "value"
    leaves = {n: t.to(dtype) if plain else t.to(dtype).abs() for n, t in case.leaves().items()}
    found = gains(case)
    for i, one in enumerate(found):
        if one is not None:
            leaves[f"magnitude{i}"] = (one[2] if plain else one[2].abs()).to(dtype).detach()
    for leaf in leaves.values():
        leaf.requires_grad_()
    mixes: dict[int, Mix] = {-1: (1.0, 0.0, 1.0)}
    for i, one in enumerate(found):
        mixes[i] = mixes[-1]
        if one is not None:
            mixes[i] = _mix(kind, leaves[f"magnitude{i}"], one[2], case.dropout_p > 0)
    scalings = [one.s if plain else abs(one.s) for one in case.adapters]
    W = case.dense(case.x.dtype).to(dtype)
    y = _formula(case, leaves, W if plain else W.abs(), mixes, scalings)
    grad_y = case.grad_y.reshape(-1, case.N).to(dtype)
    grads = torch.autograd.grad(
        y, list(leaves.values()), grad_y if plain else grad_y.abs(),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    result = dict(zip(leaves, grads, strict=True))
    for i, one in enumerate(found):
        if one is not None:  # the leaf was the gain, magnitude / norm
            inverse = torch.where(one[0] > 0, 1 / one[0], 0.0)
            result[f"magnitude{i}"] = (result[f"magnitude{i}"] * inverse).to(dtype)
    return {"y": y.detach().reshape(*case.x.shape[:-1], case.N), **result}


def _gain_error(case: AdapterCase, split: bool) -> dict[str, torch.Tensor]:
    """What the error of the norms does to each result: output by output, never cancelling."""
    W, factor, rows = case.dense(case.x.dtype).double(), case.dropout_factor(), case.rows_of()
    dropped = case.x.reshape(-1, case.K).double() * factor
    dy = case.grad_y.reshape(-1, case.N).double()
    found = {"y": torch.zeros_like(dy), "x": torch.zeros_like(dropped)}
    for i, (one, gain) in enumerate(zip(case.adapters, gains(case, split), strict=True)):
        if gain is None:
            continue
        mine = rows == i
        norm, relative, exact = gain
        off, A, B = relative * exact.abs(), one.A.double(), one.B.double()
        whole, dy_i, x_i = W + one.s * B @ A, dy[mine], dropped[mine]
        inner = x_i @ whole.t()
        found["y"][mine] = off * inner.abs()
        found["x"][mine] = factor[mine] * ((off * dy_i.abs()) @ whole.abs())
        found[f"A{i}"] = (abs(one.s) * off[:, None] * B.abs()).t() @ (dy_i.t() @ x_i).abs()
        found[f"B{i}"] = abs(one.s) * off[:, None] * (dy_i.t() @ (x_i @ A.t())).abs()
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        found[f"magnitude{i}"] = relative * inverse * (dy_i * inner).sum(dim=0).abs()
    found["y"] = found["y"].reshape(*case.x.shape[:-1], case.N)
    found["x"] = found["x"].reshape(case.x.shape)
    return found


def _rounded_output(
    case: AdapterCase, y: torch.Tensor, before: torch.Tensor | float
) -> dict[str, torch.Tensor]:
    """What the rounding of the saved y, and of the sum before it, does to each magnitude's."""
    y, dy, rows = y.reshape(-1, case.N), case.grad_y.reshape(-1, case.N).double(), case.rows_of()
    bias = torch.zeros(case.N) if case.bias is None else case.bias
    found = {}
    for i, (one, gain) in enumerate(zip(case.adapters, gains(case), strict=True)):
        if gain is None or one.magnitude is None:
            continue
        y_i, dy_i = y[rows == i], dy[rows == i]
        size = ((y_i - bias.double()) ** 2).mean(dim=0).sqrt()
        used = (bias.double().abs() <= 1.01 * MOST_BIAS[case.x.dtype] * size).logical_and(
            gain[2].abs() >= 0.99 * LEAST_GAIN
        )
        off = ulp(y_i, case.x.dtype) / 2 + 4 * U * y_i.abs()
        if isinstance(before, torch.Tensor):
            off = off + before[rows == i]
        if case.compute == "int8":
            off = off + _int8(case).reshape(-1, case.N)[rows == i]
        error = (dy_i.abs() * off).sum(dim=0) / one.magnitude.double().abs()
        found[f"magnitude{i}"] = torch.where(used, error, 0.0)
    return found


def adapter_budget(
    case: AdapterCase, engine: bool, triton: bool = False
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (truth, budget) of y and of every gradient, by name, fp64.

        2 max|plain - truth| + ulp(truth) + 4 sqrt(depth) 2^-24 sum|terms| + gain error

    `plain` is the same formula in fp32 torch, rounded once; `terms` are the products that the
    exact sum consists of; the gain error is the norm's, times what the gain multiplies. For a
    magnitude's gradient also what the rounding of the saved y does to it.

    Args:
        case: the call.
        engine: the products with W take bf16 operands: the gradient that passes through W is
            rounded once after the gain, and A meets W as two halves for the norm.
        triton: with x in bf16 or fp16 the products with W are rounded before the adapter is added,
            and their operands are of x's dtype: the gradient is rounded after the gain.

    Returns:
        (truth, budget) by name.
    """
    truth = _differentiated(case, torch.float64, "value")
    plain = _differentiated(case, torch.float32, "value")
    size = _differentiated(case, torch.float64, "size")
    gain = _gain_error(case, split=engine)
    triton = triton and case.x.dtype is not torch.float32
    before = _rounded_products(case, truth) if triton else {}
    output = {}
    if case.dropout_p == 0:
        output = _rounded_output(case, truth["y"], before["y"] if triton else 0.0)
    dtypes = {n: t.dtype for n, t in case.leaves().items()} | {"y": case.x.dtype}
    M, N, K = len(case.rows_of()), case.N, case.K
    found = {}
    for name, value in truth.items():
        i = int("".join(c for c in name if c.isdigit()) or 0)
        r = max(case.adapters[i].A.shape[0], *(a.A.shape[0] for a in case.adapters))
        kind = name.rstrip("0123456789")
        depths = {"y": K + r, "x": N + r, "A": N + M, "B": K + M, "magnitude": K + r + M}
        budget = 4 * math.sqrt(depths.get(kind, M)) * U * size[name] + ulp(value, dtypes[name])
        if name in gain:
            budget = budget + gain[name]
        if name in output:
            budget = budget + output[name]
        if value.numel():
            off = (plain[name].to(dtypes[name]).double() - value).abs()
            budget = budget + 2 * off.max()
        found[name] = (value, budget)
    if case.compute == "int8":
        found["y"] = (truth["y"], found["y"][1] + _int8(case))
    for name, value in before.items():
        found[name] = (truth[name], found[name][1] + value.reshape(truth[name].shape))
    if engine or triton:
        found["x"] = (truth["x"], found["x"][1] + _rounded_gradient(case))
    return found


def _gain_of_rows(case: AdapterCase) -> torch.Tensor:
    """The gain, magnitude / norm, of every row of x, fp64 [M, N]; 1 without DoRA."""
    table = torch.ones(1 + len(case.adapters), case.N, dtype=torch.float64)
    for i, one in enumerate(gains(case)):
        if one is not None:
            table[1 + i] = one[2]
    return table[1 + case.rows_of()]


def _int8(case: AdapterCase) -> torch.Tensor:
    """What compute="int8" adds, times the gain: it changes the product of x with W only."""
    if not isinstance(case.base, WeightCase):
        raise TypeError('compute="int8" needs an NF4 base')
    dense = case.dense(case.x.dtype).double()
    error = int8_error(case.x.reshape(-1, case.K), dense, case.base.scales())
    if case.dropout_p == 0:
        error = _gain_of_rows(case).abs() * error
    return error.reshape(*case.x.shape[:-1], case.N)


def _rounded_gradient(case: AdapterCase) -> torch.Tensor:
    """What one rounding of gain * grad_y to 16 bits adds to the gradient of x, with DoRA."""
    gain = _gain_of_rows(case)
    W = case.dense(case.x.dtype).double().abs()
    scaled = ((gain if case.dropout_p == 0 else gain - 1) * case.grad_y.reshape(-1, case.N)).abs()
    scaled = torch.where(gain == 1, 0.0, scaled)
    rounding = FP16_ROUNDING if case.x.dtype is torch.float16 else BF16_ROUNDING
    # What is subnormal is off by half of the smallest number.
    least = torch.where(scaled > 0, ulp(scaled, case.x.dtype) / 2, 0)
    off = torch.maximum(rounding * scaled, least)
    return (off @ W * case.dropout_factor()).reshape(case.x.shape)


def _rounded_products(case: AdapterCase, truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What one rounding to x's dtype, of a product with W or of what it is added to, does."""
    dtype, gain, factor = case.x.dtype, _gain_of_rows(case), case.dropout_factor()
    W, x = case.dense(dtype).double(), case.x.reshape(-1, case.K).double()
    dy = case.grad_y.reshape(-1, case.N).double()
    bias = torch.zeros(case.N) if case.bias is None else case.bias
    through = dy @ W if case.dropout_p else (gain * dy) @ W
    rest = truth["x"].reshape(x.shape) - through
    grad_x = torch.maximum(ulp(through, dtype), ulp(rest, dtype)) / 2
    base = x @ W.t()
    rest = torch.where(gain == 1, truth["y"].reshape(dy.shape) - base, 0.0)
    y = torch.maximum(ulp(base + bias.double(), dtype), ulp(rest, dtype)) / 2
    if case.dropout_p == 0:
        return {"y": gain.abs() * y, "x": grad_x}
    y = y + (gain - 1).abs() * ulp((factor * x) @ W.t(), dtype) / 2
    return {"y": y, "x": grad_x + factor * ulp(((gain - 1) * dy) @ W, dtype) / 2}
