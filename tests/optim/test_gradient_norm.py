"""The gradient norm: exact, and the same bits for every way to spread rows over ranks."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from feinwerk import optim
from feinwerk.optim.gradient_norm import (
    SQUARE_SUM_LENGTH,
    clip_coefficient,
    first_nonfinite,
    norm_of,
    row_square_sums,
    square_sum,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wide(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float) -> torch.Tensor:
    """Numbers whose magnitudes differ by powers of e, from row to row and inside of a row."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.randn(shape, generator=generator) * spread).clamp(-80, 80)
    return (torch.randn(shape, generator=generator) * size.exp()).to(dtype)


def root(total: Fraction) -> float:
    """The square root of a rational number to more than fp64's precision."""
    scale = 2**2000
    return float(Fraction(math.isqrt(int(total * scale)), 2**1000))


def exact_norm(grads: list[torch.Tensor]) -> float:
    return root(sum((Fraction(x) ** 2 for g in grads for x in g.flatten().tolist()), Fraction(0)))


@given(
    rows=st.integers(0, 40),
    columns=st.one_of(st.integers(1, 200), st.just(0)),
    vector=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 3.0, 25.0]),
    ranks=st.integers(1, 7),
    seed=st.integers(0, 2**20),
)
def test_rows_may_be_anywhere_and_in_any_order(
    rows: int, columns: int, vector: int, dtype: torch.dtype, spread: float, ranks: int, seed: int
) -> None:
    spread = min(spread, 1.0) if dtype is torch.float16 else spread
    grads = [wide((rows, columns), dtype, seed, spread), wide((vector,), dtype, seed + 1, spread)]
    grads.append(wide((3, 5, 7), dtype, seed + 2, spread))
    whole = square_sum(grads)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(SQUARE_SUM_LENGTH, dtype=torch.int64)
    owners = [torch.randint(ranks, (len(g),), generator=generator) for g in grads]
    for rank in range(ranks):
        shards = [
            g[torch.nonzero(owner == rank).flatten().flip(0)]
            for g, owner in zip(grads, owners, strict=True)
        ]
        total += square_sum(reversed(shards))
    assert norm_of(total) == norm_of(whole)
    truth = exact_norm(grads)
    # Each row's sum of n squares has a relative error of log2(n) roundings, halved by the root;
    # the sum of rows is exact, and its conversion and the root round once each.
    depth = math.ceil(math.log2(max(columns, 35)))
    assert abs(norm_of(whole) - truth) <= (depth / 2 + 2) * 2.0**-53 * truth


@pytest.mark.parametrize("shape", [(700, 300), (1, 300_001), (90_000, 3), (200_000,)])
def test_threads_and_slabs_do_not_show(shape: tuple[int, ...]) -> None:
    grad = wide(shape, torch.float32, 0, 4.0)
    alone = square_sum([grad])
    cuts = sorted([0, 1, shape[0] // 3, shape[0]])
    pieces = [grad[a:b] for a, b in itertools.pairwise(cuts)]
    torch.set_num_threads(2)
    assert norm_of(square_sum([grad])) == norm_of(alone)
    assert norm_of(square_sum(pieces)) == norm_of(alone)
    torch.set_num_threads(1)
    apart = sum(square_sum([piece]) for piece in pieces)
    assert isinstance(apart, torch.Tensor)
    assert norm_of(apart) == norm_of(alone)
    plain = grad.double().square().sum().sqrt().item()
    assert norm_of(alone) == pytest.approx(plain, rel=1e-12)


def test_a_float_sum_would_not_do() -> None:
    """What the limbs are for: fp64 partial sums of the same rows differ by their grouping."""
    rows = row_square_sums(wide((300, 50), torch.float32, 0, 4.0))
    assert len({float(sum(part.sum() for part in rows.split(n))) for n in (7, 50, 100, 300)}) > 1


def test_a_row_s_order_does_not_depend_on_its_neighbours() -> None:
    for length in (1, 2, 3, 63, 64, 65, 1000, 5000):
        grad = wide((60, length), torch.float32, length, 2.0)
        sums = row_square_sums(grad)
        for i in (0, 1, 31, 59):
            assert row_square_sums(grad[i : i + 1]) == sums[i]
        assert torch.equal(row_square_sums(grad.t().contiguous().t()), sums)


@pytest.mark.parametrize(
    "values",
    [[2.0**-149], [2.0**-149, 2.0**-140], [torch.finfo(torch.float32).max], [0.0], [],
     [2.0**-149, torch.finfo(torch.float32).max, 1.0], [1.0 + 2.0**-23] * 1000],
)  # fmt: skip
def test_extremes_are_exact(values: list[float]) -> None:
    grad = torch.tensor(values)
    total = sum((Fraction(x) ** 2 for x in grad.tolist()), Fraction(0))
    digits = square_sum([grad])[:-2].tolist()
    assert sum(Fraction(d) * Fraction(2) ** (30 * i - 300) for i, d in enumerate(digits)) == total
    assert norm_of(square_sum([grad])) == pytest.approx(root(total), rel=2.0**-52, abs=0)


def test_many_large_rows_do_not_overflow_a_limb() -> None:
    """2^33 rows fit 63 bits: the limbs of one row stay below 2^30."""
    one = square_sum([torch.full((1, 1 << 16), torch.finfo(torch.float32).max)])
    assert int(one.max()) < 2**30
    assert norm_of(one * 2**33) == pytest.approx(norm_of(one) * 2**16.5, rel=1e-15)


def test_nan_and_infinity_come_out() -> None:
    inf, nan = math.inf, math.nan
    clean = torch.ones(5, 6)
    for value, expected in ((inf, inf), (-inf, inf), (nan, nan)):
        for shape in ((5, 6), (30,), ()):
            bad = torch.ones(shape)
            bad.view(-1)[-1] = value
            norm = norm_of(square_sum([clean, bad]) + square_sum([clean]))
            assert norm == expected or (math.isnan(norm) and math.isnan(expected))
    assert math.isnan(norm_of(square_sum([torch.tensor([inf])]) + square_sum([torch.tensor(nan)])))


def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.float64, torch.complex64, torch.int32):
        with pytest.raises(TypeError, match=r"row_square_sums: grad must be torch.float32"):
            row_square_sums(torch.ones(2, 2).to(dtype))


def test_the_norm_of_parameters() -> None:
    params = [torch.zeros(4, 3, requires_grad=True), torch.zeros(7, requires_grad=True)]
    params.append(torch.zeros(2, requires_grad=True))  # has no gradient
    assert optim.gradient_norm(params) == 0.0
    for seed, param in enumerate(params[:2]):
        param.grad = wide(tuple(param.shape), torch.float32, seed, 1.0)
    truth = exact_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(iter(params)) == pytest.approx(truth, rel=2.0**-51)
    assert params[0].grad is not None
    assert optim.gradient_norm(params[0]) == pytest.approx(exact_norm([params[0].grad]), rel=1e-15)
    reference = torch.nn.utils.get_total_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(params) == pytest.approx(float(reference), rel=1e-6)
    assert first_nonfinite(params) is None
    params[1].grad = torch.full((7,), math.nan)
    assert first_nonfinite(params) == 1


def test_the_clip_coefficient_is_torch_s() -> None:
    for norm in (0.0, 0.5, 1.0, 1.5, 1e10, math.inf):
        param = torch.zeros(1, requires_grad=True)
        param.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        expected = torch.tensor([norm]) * clip_coefficient(norm, 1.0)
        assert torch.allclose(param.grad, expected, rtol=1e-6, equal_nan=True)
    assert math.isnan(clip_coefficient(math.nan, 1.0))
