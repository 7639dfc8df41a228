"""square_sum: exact, and the same bits for every way to spread rows, on every backend."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from feinwerk import square_sum, testing
from feinwerk.optim.gradient_norm import SQUARE_SUM_LENGTH, norm_of

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
    backend: str,
    rows: int,
    columns: int,
    vector: int,
    dtype: torch.dtype,
    spread: float,
    ranks: int,
    seed: int,
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
    # A term of a row's sum is rounded once by every addition it goes through: those of its lane and
    # four folds; the root halves that. The sum of rows is exact; its conversion and the root round
    # once each.
    depth = math.ceil(max(columns, 35) / 16) + 4
    assert abs(norm_of(whole) - truth) <= (depth / 2 + 2) * 2.0**-53 * truth


@pytest.mark.parametrize("shape", [(700, 300), (1, 300_001), (90_000, 3), (200_000,)])
def test_threads_and_slabs_do_not_show(backend: str, shape: tuple[int, ...]) -> None:
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


def test_a_row_s_order_does_not_depend_on_its_neighbours(backend: str) -> None:
    for length in (1, 2, 3, 15, 16, 17, 64, 1000, 1024, 1025, 5000):
        grad = wide((20, length), torch.float32, length, 2.0)
        whole = square_sum([grad])
        rows = torch.stack([square_sum([grad[i : i + 1]]) for i in range(20)])
        assert norm_of(rows.sum(0)) == norm_of(whole)
        assert norm_of(square_sum([grad.t().contiguous().t()])) == norm_of(whole)


def test_every_backend_gives_the_bits_of_the_reference(backend: str) -> None:
    for shape in ((3, 5000), (40, 33), (7, 16), (5, 1), (9,), (2, 3, 4), (0, 4)):
        for dtype in DTYPES:
            tensor = wide(shape, dtype, sum(shape), 1.0)
            got = square_sum([tensor])
            with testing.use_backend("reference"):
                want = square_sum([tensor])
            assert value(got) == value(want)
            assert got[-2:].equal(want[-2:])


def value(limbs: torch.Tensor) -> int:
    return sum(digit << 30 * i for i, digit in enumerate(limbs[:-2].tolist()))


def test_op_contract() -> None:
    tensors = [torch.randn(3, 5), torch.randn(4)]
    torch.library.opcheck(torch.ops.feinwerk.square_sum.default, (tensors,))
    compiled = torch.compile(lambda x: square_sum([x, x]) + 1, fullgraph=True)
    assert torch.equal(compiled(tensors[0]), square_sum([tensors[0]] * 2) + 1)


@pytest.mark.parametrize(
    "values",
    [[2.0**-149], [2.0**-149, 2.0**-140], [torch.finfo(torch.float32).max], [0.0], [],
     [2.0**-149, torch.finfo(torch.float32).max, 1.0], [1.0 + 2.0**-23] * 1000],
)  # fmt: skip
def test_extremes_are_exact(backend: str, values: list[float]) -> None:
    grad = torch.tensor(values)
    total = sum((Fraction(x) ** 2 for x in grad.tolist()), Fraction(0))
    digits = square_sum([grad])[:-2].tolist()
    assert sum(Fraction(d) * Fraction(2) ** (30 * i - 300) for i, d in enumerate(digits)) == total
    assert norm_of(square_sum([grad])) == pytest.approx(root(total), rel=2.0**-52, abs=0)


def test_many_large_rows_do_not_overflow_a_limb(backend: str) -> None:
    """2^33 rows fit 63 bits: the limbs of one row stay below 2^30."""
    one = square_sum([torch.full((1, 1 << 16), torch.finfo(torch.float32).max)])
    assert int(one.max()) < 2**30
    assert norm_of(one * 2**33) == pytest.approx(norm_of(one) * 2**16.5, rel=1e-15)


def test_nan_and_infinity_come_out(backend: str) -> None:
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
        with pytest.raises(TypeError, match=r"square_sum: tensors\[0\] must be torch.float32"):
            square_sum([torch.ones(2, 2).to(dtype)])
