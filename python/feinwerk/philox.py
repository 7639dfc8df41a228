"""Philox4x32-10, the one counter-based generator: random words by address, without a state.

A word depends on the key and the counter only, so that any tiling, any thread, the forward and the
backward draw the same dropout mask without storing it. Source: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011); docs/philox.md has the test vectors and the addressing.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

# Columns that share one group of counters: word j of counter i serves column 16 j + i of the 64.
_LANES = 16
_WORDS = 4


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the four 32-bit words of every counter.

    Ten rounds of (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1,
    lo(M0 c0)), the key growing by the Weyl constants between them.

    Args:
        counter: four int64 tensors of one shape, each word in [0, 2^32).
        key: two int64 tensors that broadcast with it, each word in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> hex(int(philox4x32((zero,) * 4, (zero, zero))[0]))
        '0x6627e8d5'
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits.
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def element_words(seed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the random word of every element of a matrix, addressed by (row, column).

    Element (row, column) is word (column % 64) // 16 of the counter

        (16 (column // 64) + column % 16) + 2^64 row

    under the key `seed`: whatever part of the matrix is drawn, the words are the same.

    Args:
        seed: 0-dim int64; its low and high 32 bits are the key.
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        int64 [rows, columns] with values in [0, 2^32).

    Example:
        >>> element_words(torch.tensor(7), 2, 3).shape
        torch.Size([2, 3])
    """
    device = seed.device
    groups = -(-columns // (_LANES * _WORDS)) * _LANES
    index = torch.arange(groups, device=device).expand(rows, groups)
    row = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    counter = (index & _WORD, index >> 32, row & _WORD, row >> 32)
    words = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    blocks = [word.view(rows, groups // _LANES, _LANES) for word in words]
    return torch.stack(blocks, dim=2).reshape(rows, groups * _WORDS)[:, :columns]


def row_words(seed: torch.Tensor, row: int, first: int, count: int) -> torch.Tensor:
    """Return the random words of a stretch of one row, addressed as in `element_words`.

    Args:
        seed: 0-dim int64.
        row: its number, below 2^63.
        first: column of the first word.
        count: of words.

    Returns:
        int64 [count] with values in [0, 2^32).

    Example:
        >>> row_words(torch.tensor(7), 0, 1, 2).equal(element_words(torch.tensor(7), 1, 3)[0, 1:])
        True
    """
    columns = torch.arange(first, first + count, device=seed.device)
    block, inside = columns // (_LANES * _WORDS), columns % (_LANES * _WORDS)
    index = block * _LANES + inside % _LANES
    high, low = torch.full_like(index, row >> 32), torch.full_like(index, row & _WORD)
    counter = (index & _WORD, index >> 32, low, high)
    words = torch.stack(philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD)))
    return words.gather(0, (inside // _LANES)[None])[0]


def threshold(probability: float) -> int:
    """Return the word below which an element is dropped with this probability.

    Args:
        probability: in [0, 1).

    Returns:
        An integer in [0, 2^32).

    Example:
        >>> threshold(0.5) == 2**31
        True
    """
    return min(round(probability * 2**32), _WORD)


def keep_mask(seed: torch.Tensor, rows: int, columns: int, probability: float) -> torch.Tensor:
    """Return which elements of a matrix survive dropout.

    Args:
        seed: 0-dim int64.
        rows: of the matrix.
        columns: of the matrix.
        probability: of dropping an element, in [0, 1).

    Returns:
        bool [rows, columns].

    Example:
        >>> keep_mask(torch.tensor(7), 2, 3, 0.0).all()
        tensor(True)
    """
    return element_words(seed, rows, columns) >= threshold(probability)
