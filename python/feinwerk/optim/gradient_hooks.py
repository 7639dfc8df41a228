"""GradientHooks: calls a method whenever the gradient of a parameter has been accumulated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


class GradientHooks:
    """Hooks of parameters. They keep nothing alive, and are removed when this object goes.

    Args:
        arrived: a bound method that takes the parameter.
    """

    def __init__(self, arrived: Callable[[torch.Tensor], None]) -> None:
        """Begin without hooks."""
        self._arrived = weakref.WeakMethod(arrived)
        self._handles: Any = WeakIdKeyDictionary()
        weakref.finalize(self, _remove, self._handles)

    def add(self, params: Iterable[torch.Tensor]) -> None:
        """Hook into those that are trained and have no hook yet."""
        for param in params:
            if param.requires_grad and param.is_leaf and param not in self._handles:
                register: Any = param.register_post_accumulate_grad_hook
                self._handles[param] = register(partial(_call, self._arrived))

    def remove(self) -> None:
        """Remove all of them."""
        _remove(self._handles)


def _call(arrived: weakref.WeakMethod[Callable[[torch.Tensor], None]], param: torch.Tensor) -> None:
    method = arrived()
    if method is not None:
        method(param)


def _remove(handles: Any) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
