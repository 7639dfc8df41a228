"""Philox4x32-10: published vectors, words by element, masks, and the mask of every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import grouped_lora_linear, lora_linear, testing
from feinwerk.philox import element_words, keep_mask, philox4x32, threshold
from feinwerk.testing import assert_same_bits

# Counter, key and words as the authors of the generator publish them (Random123, kat_vectors).
VECTORS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SEEDS = (0, 1, 7, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63))


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


def by_hand(seed: int, row: int, column: int) -> int:
    """One element's word, from the definition, in Python's integers."""
    low = 16 * (column // 64) + column % 16
    counter = [low % 2**32, low >> 32, row % 2**32, row >> 32]
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second % 2**32,
            (first >> 32) ^ counter[3] ^ key[1],
            first % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter[column % 64 // 16]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS, ids=["zero", "ones", "pi"])
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    got = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word) for word in got] == [int(word, 16) for word in expected.split()]


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    rows=st.integers(0, 5),
    columns=st.integers(0, 200),
)
def test_a_word_is_its_element_s(seed: int, rows: int, columns: int) -> None:
    got = element_words(torch.tensor(seed), rows, columns)
    want = [[by_hand(seed, row, column) for column in range(columns)] for row in range(rows)]
    assert got.tolist() == want


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_has_the_words_of_the_whole(seed: int) -> None:
    whole = element_words(torch.tensor(seed), 9, 333)
    for rows, columns in ((9, 1), (1, 333), (4, 64), (5, 65), (3, 17)):
        assert torch.equal(element_words(torch.tensor(seed), rows, columns), whole[:rows, :columns])
    assert whole.min() >= 0
    assert whole.max() < 2**32


def test_seeds_give_different_words() -> None:
    drawn = torch.stack([element_words(torch.tensor(seed), 8, 64).flatten() for seed in SEEDS])
    # A pair of 32-bit words is equal with probability 2^-32.
    for i in range(len(SEEDS)):
        for j in range(i):
            assert int((drawn[i] == drawn[j]).sum()) <= 1


def test_no_word_repeats_more_often_than_chance() -> None:
    drawn = element_words(torch.tensor(3), 256, 256).flatten()
    # n^2 / 2^33 = 0.5 pairs are expected.
    assert drawn.numel() - drawn.unique().numel() <= 6


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.3, 0.5, 0.9, 1 - 2.0**-32])
def test_how_many_are_kept(probability: float) -> None:
    rows, columns = 500, 600
    keep = keep_mask(torch.tensor(11), rows, columns, probability)
    assert keep.dtype is torch.bool
    assert keep.shape == (rows, columns)
    kept = 1 - probability
    # Five standard deviations of a binomial: of the whole, of each row, of each column.
    for part, size in ((keep.flatten(), rows * columns), (keep, columns), (keep.t(), rows)):
        mean = part.double().mean(dim=-1)
        assert ((mean - kept).abs() <= 5 * math.sqrt(kept * probability / size) + 1 / size).all()


def test_neighbours_are_independent() -> None:
    keep = keep_mask(torch.tensor(11), 500, 640, 0.5).double() * 2 - 1
    for shift in (1, 4, 16, 32, 48, 64):
        along = (keep[:, shift:] * keep[:, :-shift]).flatten()
        below = (keep[shift:] * keep[:-shift]).flatten()
        for products in (along, below):
            assert products.mean().abs() <= 5 / math.sqrt(products.numel())


def test_threshold() -> None:
    assert threshold(0.0) == 0
    assert threshold(0.25) == 2**30
    assert threshold(2.0**-32) == 1
    assert threshold(1 - 2.0**-40) == 2**32 - 1  # one word in 2^32 is still kept


def identity(K: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """W = 0, A = B = 1: the layer returns dropout(x)."""
    return torch.zeros(K, K, dtype=dtype), torch.eye(K), torch.eye(K)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_backend_draws_the_same_mask(backend: str, seed: int, dtype: torch.dtype) -> None:
    for rows, K in ((1, 64), (3, 130), (5, 1), (40, 97)):
        drawn = torch.tensor(seed)
        for p in (0.25, 0.5):  # 1 / (1 - p) is then 4/3, which rounds, and 2, which does not
            x = torch.ones(rows, K, dtype=dtype)
            y = lora_linear(x, *identity(K, dtype), dropout_p=p, seed=drawn)
            assert torch.equal(y != 0, keep_mask(drawn, rows, K, p))
            if p == 0.5:
                assert set(y.unique().tolist()) <= {0.0, 2.0}


def test_many_rows_and_both_directions(backend: str) -> None:
    # More rows than any tile or chunk has; the backward must draw what the forward drew.
    rows, K, seed = 1100, 70, torch.tensor(99)
    keep = keep_mask(seed, rows, K, 0.5)
    x = torch.ones(rows, K, requires_grad=True)
    y = lora_linear(x, *identity(K, torch.float32), dropout_p=0.5, seed=seed)
    assert_same_bits(y.detach(), keep.float() * 2)
    y.sum().backward()
    assert_same_bits(x.grad, keep.float() * 2)


def test_a_grouped_batch_numbers_rows_once_sorted(backend: str) -> None:
    K, seed = 70, torch.tensor(5)
    W, A, B = identity(K, torch.float32)
    index = torch.tensor([1, -1, 0, 1, 0, -1, 1])
    y = grouped_lora_linear(
        torch.ones(7, K), W, [A, A], [B, B], index, scaling=[1.0, 1.0], dropout_p=0.5, seed=seed
    )
    keep = keep_mask(seed, 7, K, 0.5)
    order = torch.argsort(index, stable=True)
    assert_same_bits(y[order[2:]], keep[2:].float() * 2)
    assert not y[order[:2]].any()
