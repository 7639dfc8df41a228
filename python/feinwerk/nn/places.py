"""Where the modules of a model hang, and the names that select them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


@dataclass
class Place:
    """Where a module hangs: one parent, one attribute. Modules themselves are not held."""

    parent: nn.Module
    attribute: str
    name: str

    @property
    def module(self) -> nn.Module:
        """The module that hangs there."""
        module = self.parent._modules[self.attribute]
        assert module is not None
        return module


def places_of(model: nn.Module) -> Iterator[Place]:
    """Every position of every module, in model order; a module in two places comes twice."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[tuple[int, str]] = set()
    for name in list(modules)[1:]:
        parent_name, _, attribute = name.rpartition(".")
        parent = modules[parent_name]
        # The children of a module in two places hang in it once.
        if (id(parent), attribute) not in seen:
            seen.add((id(parent), attribute))
            yield Place(parent, attribute, name)


def matches(entry: str, name: str) -> bool:
    """Whether an entry selects a name: a run of its dotted parts, or a pattern for all of it."""
    return f".{entry}." in f".{name}." or fnmatchcase(name, entry)
