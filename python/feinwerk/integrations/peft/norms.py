"""The row norms that DoRA needs, kept as long as they are certain to be right.

The base's norms depend on a frozen weight: one fp32 vector per layer. The norms of W + s B A are
kept only in eval mode without gradients. In-place writes through `.data`, as PEFT's hotswap makes
them, change no version counter, so what is kept stands beside a sketch of the A and B that it was
made from (A u and v B for fixed random u and v, 2 r numbers), and is used only while A and B
still give the same sketch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from feinwerk.integrations.peft.base import Base
from feinwerk.ops import row_norms, weight_norm


class NormCache:
    """What one layer remembers; nothing of it is saved, copied or pickled."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self.clear()

    def clear(self) -> None:
        """Forget everything: whatever the norms were made from may have changed."""
        self._owner: torch.Tensor | None = None
        self._version: int | None = None
        self._base: torch.Tensor | None = None
        self.forget_adapters()

    def forget_adapters(self) -> None:
        """Forget the norms with adapters; the base's stay."""
        self._adapters: dict[str, tuple[float, torch.Tensor, torch.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts with nothing: it finds its own norms."""
        return NormCache, ()

    def base_norm(self, base: Base) -> torch.Tensor:
        """The norms of the base's rows, in the dtype that its weight stands for."""
        if torch.compiler.is_compiling():  # reads only: a traced write could be lost or refused
            return row_norms_of(base) if self._base is None else self._base
        version = None if base.owner.is_inference() else base.owner._version
        if self._base is None or self._owner is not base.owner or self._version != version:
            self.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._base = row_norms_of(base)
            self._owner, self._version = base.owner, version
        return self._base

    def weight_norm(
        self, name: str, base: Base, A: torch.Tensor, B: torch.Tensor, scaling: float | torch.Tensor
    ) -> torch.Tensor:
        """The norms with adapter `name`, for a call in eval mode without gradients."""
        base_norm = self.base_norm(base)  # first: it forgets all when the base is another one
        factor, sketch = float(scaling), _sketch(A, B)
        known = self._adapters.get(name)
        if known is not None and known[0] == factor and torch.equal(known[1], sketch):
            return known[2]
        norm = adapted_norm(base, A, B, scaling, base_norm)
        self._adapters[name] = (factor, sketch, norm)
        return norm


def row_norms_of(base: Base) -> torch.Tensor:
    """The norms of the base's rows."""
    return row_norms(
        base.weight, **base.tables, shape=base.shape, blocksize=base.blocksize, dtype=base.dtype
    )


def adapted_norm(
    base: Base,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float | torch.Tensor,
    base_norm: torch.Tensor,
) -> torch.Tensor:
    """The norms of the rows of W + s B A."""
    return weight_norm(
        base.weight, A, B, **base.tables, scaling=scaling, base_norm=base_norm,
        blocksize=base.blocksize, dtype=base.dtype,
    )  # fmt: skip


def _sketch(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    device = A.device
    with torch.autocast(device.type, enabled=False):
        left = torch.mv(A.float(), _probe(A.shape[1], device))
        right = torch.mv(B.float().t(), _probe(B.shape[0], device))
    return torch.cat([left, right])


@functools.lru_cache(maxsize=64)
def _probe(size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    with torch.inference_mode(False):
        return torch.randn(size, generator=generator).to(device)
