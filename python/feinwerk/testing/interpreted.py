"""The one place where tests take less in Triton's interpreter than on a CPU or a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

from feinwerk import _library

T = TypeVar("T")


def some(cases: Iterable[T], count: int) -> list[T]:
    """Return all cases, or `count` of them in Triton's interpreter.

    A program of a kernel takes tens of milliseconds there, whatever its tile. The first and the
    last case are always taken, the others by a fixed draw, in their order.

    Args:
        cases: of a loop or of `parametrize`.
        count: how many of them the interpreter has time for.

    Returns:
        A list.

    Example:
        >>> some(range(3), 2)
        [0, 1, 2]
    """
    every = list(cases)
    if not _library.interpreting() or len(every) <= count:
        return every
    drawn = random.Random(0).sample(range(1, len(every) - 1), max(0, count - 2))
    return [every[i] for i in sorted({0, *drawn, len(every) - 1})]
