"""Fresh memory that shows what a kernel forgets to write: NaN, or the largest integer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._device import _device_constructors


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what feinwerk allocates inside the block by torch.empty and torch.empty_like.

    Example:
        >>> with poisoned():
        ...     pass
    """
    _device_constructors()  # what torch.device has to wrap; found once, before it is ours
    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like"):
            patched = _filling(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, patched))
        yield


def _filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Of two blocks, one in the other, the inner one is called by the outer one from here.
        ours = caller.partition(".")[0] == "feinwerk" and caller != __name__
        if ours and type(fresh) is torch.Tensor and fresh.device.type in ("cpu", "cuda"):
            if fresh.is_floating_point():
                fresh.fill_(torch.nan)
            else:
                fresh.fill_(torch.iinfo(fresh.dtype).max)
        return fresh

    return wrapper
