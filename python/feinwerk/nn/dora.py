"""DoRA: the magnitude that an adapter module gets, and the norms that it is divided by."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import nf4_rows
from feinwerk.nn.adapter import Adapter


class DoRA(Adapter):
    """The part of DoRA: the magnitude, and the norms of the rows of W + scaling B A.

    With gradients the norm is computed in every forward. Only in eval mode without gradients is it
    kept, N floats; `base_norm`, N floats of the frozen base alone, is kept until W may have
    changed.
    """

    magnitude: nn.Parameter
    base_norm: torch.Tensor | None
    _weight_norm: tuple[Any, torch.Tensor] | None

    def __init__(self, base_layer: nn.Module, r: int, **options: Any) -> None:
        """Make the adapter, then the magnitude that leaves the layer as it is."""
        super().__init__(base_layer, r, **options)
        self.register_buffer("base_norm", None, persistent=False)
        norm = self.weight_norm()
        self.magnitude = nn.Parameter(norm.to(self.lora_B.dtype, copy=True))

    @classmethod
    def check(cls, base_layer: nn.Module, r: int, **options: Any) -> None:
        """See `Adapter.check`."""
        super().check(base_layer, r, **options)
        if options.get("lora_bias"):
            rule = "be False: DoRA has no bias to scale"
            _checks.reject(ValueError, cls.__name__, "lora_bias", rule, True)

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's; another base (`quantize_model` puts one in) has other norms."""
        super().__setattr__(name, value)
        if name == "base_layer" and "base_norm" in self._buffers:
            self.invalidate()

    def _row_norms(self) -> torch.Tensor:
        """fp32 [N]: the norms of the base's weight alone."""
        raise NotImplementedError

    def _factored_norm(self, base_norm: torch.Tensor) -> torch.Tensor:
        """fp32 [N]: the norms of W + scaling B A."""
        raise NotImplementedError

    def _known_base_norm(self) -> torch.Tensor:
        if self.base_norm is None:
            with torch.no_grad():
                self.base_norm = self._row_norms()
        return self.base_norm

    def weight_norm(self) -> torch.Tensor:
        """Return ||W + scaling B A|| of every row, fp32 [N], computed afresh, without gradient."""
        with torch.no_grad():
            return self._factored_norm(self._known_base_norm())

    def _cached_norm(self) -> torch.Tensor | None:
        """The norm to use in eval mode without gradients; otherwise None, and none is kept."""
        # The hooks of fully_shard gather the same tensors anew without a change of version.
        if self.training or torch.is_grad_enabled() or nf4_rows.is_managed(self):
            self._weight_norm = None
            return None
        # Versions are a second net only: raw writes do not count there, see `invalidate`.
        tensors = (self.lora_A, self.lora_B)
        counted = not torch.compiler.is_compiling() and not any(t.is_inference() for t in tensors)
        key = (self.scaling, *(t._version for t in tensors)) if counted else None
        if self._weight_norm is None or self._weight_norm[0] != key:
            self._weight_norm = (key, self.weight_norm())
        return self._weight_norm[1]

    def _gain(self) -> torch.Tensor:
        return self._gain_of(self.weight_norm())

    def _gain_of(self, norm: torch.Tensor) -> torch.Tensor:
        """The ratio magnitude / norm, fp32 [N]; 0 for a row of norm zero: no direction."""
        return torch.where(norm > 0, self.magnitude.float() / norm, 0.0)

    def _forget_norm(self) -> None:
        self._weight_norm = None

    def invalidate(self) -> None:
        """See `Adapter.invalidate`."""
        self._forget_norm()
        self.base_norm = None
