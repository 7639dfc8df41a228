"""Adapter: what the adapter modules share, from their options to merging.

```
   Adapter                  base_layer (frozen weight), lora_A, lora_B, lora_bias
     LoRALinear, LoRAEmbedding, LoRAConv                  shapes and forward
   DoRA                     magnitude, and the norms it is divided by
     DoRALinear(DoRA, LoRALinear), DoRAEmbedding, DoRAConv
```
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.adapter_init import TAKES_FROM_BASE, family, initialise
from feinwerk.nn.merge import (
    KeptWeight,
    MergeReport,
    merged_weight,
    restore_weight,
    store,
    swap_weight,
)
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.weight import NF4Weight

_AdapterT = TypeVar("_AdapterT", bound="Adapter")


class Adapter(nn.Module):
    """A frozen base layer with a low-rank addition to its weight; see the subclasses.

    `weight` and `bias` are the base's, as code around the model expects them of a layer.
    """

    base_layer: nn.Module
    scaling: float | torch.Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    initial_A: torch.Tensor | None
    initial_B: torch.Tensor | None

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    # Options of a whole model that mean nothing to this kind of layer.
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        dropout: float = 0.0,
        lora_bias: bool = False,
        init: str = "default",
        iterations: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check everything, then wrap; see the subclasses."""
        super().__init__()
        self.check(
            base_layer, r, lora_alpha=lora_alpha, use_rslora=use_rslora, dropout=dropout,
            lora_bias=lora_bias, init=init, iterations=iterations, dtype=dtype,
        )  # fmt: skip
        self.base_layer = base_layer
        self.r = r
        self.set_scaling(lora_alpha, use_rslora)
        self.dropout, self.init, self.enabled = dropout, init, True
        self._kept: tuple[nn.Module, KeptWeight | None] | None = None
        weight = base_layer._parameters["weight"]
        assert weight is not None
        shape_A, shape_B = self.shapes(base_layer, r)
        options: Any = {"dtype": dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(shape_A, **options))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **options))
        bias = nn.Parameter(torch.zeros(shape_B[0], **options)) if lora_bias else None
        self.register_parameter("lora_bias", bias)
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)
        self._initialise(init, iterations)
        frozen = self.base_layer._parameters["weight"]
        assert frozen is not None
        frozen.requires_grad_(False)
        self.train(base_layer.training)

    @classmethod
    def check(
        cls,
        base_layer: nn.Module,
        r: int,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        dropout: float = 0.0,
        lora_bias: bool = False,
        init: str = "default",
        iterations: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raise what the constructor would raise, without making or changing anything."""
        op = cls.__name__
        cls._check_base(base_layer)
        if not isinstance(r, int) or r < 1:
            _checks.reject(ValueError, op, "r", "be a whole number of at least 1", r)
        if not math.isfinite(lora_alpha):
            _checks.reject(ValueError, op, "lora_alpha", "be finite", lora_alpha)
        if not 0 <= dropout < 1:
            _checks.reject(ValueError, op, "dropout", "be in [0, 1)", dropout)
        _checks.out_dtype(op, dtype)
        _checks.positive(op, "iterations", iterations)
        if family(init) not in cls.inits:
            rule = f"be one of {', '.join(map(repr, cls.inits))}"
            _checks.reject(ValueError, op, "init", rule, repr(init))
        if init == "orthogonal" and r % 2:
            _checks.reject(ValueError, op, "r", 'be even for init="orthogonal"', r)
        weight = base_layer._parameters["weight"]
        assert weight is not None
        if not isinstance(base_layer, NF4Module):
            _checks.floating(op, "base_layer.weight", weight)
        elif init == "loftq":
            rule = 'be dense for init="loftq": it quantizes the weight itself'
            _checks.reject(ValueError, op, "base_layer", rule, type(base_layer).__name__)
        if family(init) in TAKES_FROM_BASE:
            most = min(
                base_layer.weight_shape if isinstance(base_layer, NF4Module) else weight.shape
            )
            if r > most:
                _checks.reject(ValueError, op, "r", f"be at most {most} for init={init!r}", r)
            dense = base_layer.dequantize() if isinstance(base_layer, NF4Module) else weight
            if not bool(dense.isfinite().all()):
                count = int((~dense.isfinite()).sum())
                rule = f"be finite for init={init!r}"
                _checks.reject(ValueError, op, "base_layer.weight", rule, f"{count} bad elements")
            if not lora_alpha:
                _checks.reject(ValueError, op, "lora_alpha", f"not be 0 for init={init!r}", 0)

    @classmethod
    def _check_base(cls, base_layer: nn.Module) -> None:
        raise NotImplementedError

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that lora_A and lora_B have over a layer."""
        raise NotImplementedError

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """Set scaling to lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    @property
    def transposed(self) -> bool:
        """Whether the base holds its weight as [K, N]: as B A transposed."""
        return False

    @property
    def base_weight(self) -> torch.Tensor | NF4Weight:
        """The base's weight: an NF4Weight that shares its memory, or the dense Parameter."""
        base = self.base_layer
        if isinstance(base, NF4Module):
            return base.nf4_weight
        weight = base._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """The base's `weight`."""
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's `bias`."""
        return self.base_layer._parameters.get("bias")

    def _initialise(self, init: str, iterations: int) -> None:
        """Fill A and B; an init that takes them out of W leaves the rest of W in the base."""
        assert isinstance(self.scaling, float)
        A, B, rest = initialise(
            init, self.base_weight, self.lora_A, self.lora_B, self.scaling,
            iterations=iterations, transposed=self.transposed,
        )  # fmt: skip
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        if rest is None:
            return
        if isinstance(rest, NF4Weight) and not isinstance(self.base_layer, NF4Module):
            self.base_layer = self._quantized_base(rest)
        else:
            swap_weight(self.base_layer, rest)
        self.initial_A = self.lora_A.detach().clone()
        self.initial_B = self.lora_B.detach().clone()

    def _quantized_base(self, weight: NF4Weight) -> nn.Module:
        raise NotImplementedError

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """Return scaling B A in fp32, in the shape of the base's weight.

        For DoRA as well, without its gain, as PEFT defines it.
        """
        zero = torch.zeros(self._dense_shape(), device=self.lora_A.device)
        return merged_weight(
            zero, self.lora_A, self.lora_B, scaling=self.scaling, transposed=self.transposed
        )

    def _dense_shape(self) -> torch.Size:
        weight = self.base_weight
        return torch.Size(weight.shape)

    @property
    def merged(self) -> bool:
        """Whether the base holds the merged weight."""
        return self._kept is not None

    @property
    def _bare(self) -> bool:
        """Whether the base alone gives the result: merged, or switched off by `enabled`."""
        return self._kept is not None or not self.enabled

    def _gain(self) -> torch.Tensor | None:
        return None

    def merged_weight(self) -> torch.Tensor:
        """Return the base's weight with the adapter, fp32, in the base's shape; nothing changes."""
        return merged_weight(
            self.base_weight, self.lora_A, self.lora_B, scaling=self.scaling, gain=self._gain(),
            transposed=self.transposed,
        )  # fmt: skip

    @torch.no_grad()
    def merge(self, into: str = "base", *, rule: str = "cpu") -> MergeReport:
        """Put the adapter into the base's weight; the original tensors are kept for `unmerge`.

        Args:
            into: "base" keeps the base's format; for an NF4 base that means dequantize, add,
                quantize again, with an error that the report tells. "dense" puts the sum into a
                dense copy of the dequantized 4-bit base, the one the adapter was trained on, in
                the base's `dtype`.
            rule: "cpu" or "cuda", whose rounding decisions the NF4 quantizer follows.

        Returns:
            The error that storing the merged weight has added.

        Raises:
            ValueError: if it is merged already, the sum is not finite, there is a lora_bias but
                no bias to merge it into, or `into` is unknown; nothing has changed then.

        Source:
            LoRA (arXiv 2106.09685), section 4.1.
        """
        op, base = type(self).__name__, self.base_layer
        if into not in ("base", "dense"):
            _checks.reject(ValueError, op, "into", 'be "base" or "dense"', repr(into))
        if self.merged:
            _checks.reject(ValueError, op, "adapter", "be unmerged before it is merged", "merged")
        bias = self.bias
        if self.lora_bias is None:
            bias = None
        elif bias is None:
            rule_text = "have a bias to merge lora_bias into"
            _checks.reject(ValueError, op, "base_layer", rule_text, "bias=None")
        else:
            bias = bias.float() + self.scaling * self.lora_bias.float()
        exact = self.merged_weight()
        if isinstance(base, NF4Module) and into == "dense":
            stored, report = store(exact, base.dtype)
            dense = self._dense_base(stored)
            if bias is not None:
                dense.bias = nn.Parameter(bias.to(base.dtype), requires_grad=False)
            self._kept = (base, None)
            self.base_layer = dense
        elif isinstance(base, NF4Module):
            codes, report = store(exact, base.nf4_weight, rule=rule)
            self._kept = (base, swap_weight(base, codes, bias))
        else:
            stored, report = store(exact, self.weight.dtype)
            self._kept = (base, swap_weight(base, stored, bias))
        self._forget_norm()
        return report

    def _dense_base(self, weight: torch.Tensor) -> nn.Module:
        base: Any = self.base_layer
        dense: nn.Module = base.with_dense_weight(nn.Parameter(weight, requires_grad=False))
        return dense

    def unmerge(self) -> None:
        """Put the original tensors back, bit for bit.

        Raises:
            ValueError: if it is not merged.
        """
        if self._kept is None:
            op = type(self).__name__
            _checks.reject(ValueError, op, "adapter", "be merged before unmerge", "unmerged")
        base, kept = self._kept
        if kept is None:
            weight = self.weight
            assert isinstance(base, NF4Module)
            if weight.device != base.weight.device or weight.dtype != base.dtype:
                base.to(weight.device, weight.dtype)
            self.base_layer = base.train(self.training)
        else:
            restore_weight(base, kept)
        self._kept = None
        self._forget_norm()

    def release(self) -> nn.Module:
        """Return the base as it is, merged or not, for good: `unmerge` is no longer possible."""
        self._kept = None
        return self.base_layer

    def _forget_norm(self) -> None:
        pass

    def invalidate(self) -> None:
        """Forget whatever was computed from weights; to be called after writing into them raw.

        Optimizers, `load_state_dict`, `train`, `eval`, `to`, `merge` and `unmerge` need no call;
        `parameter.data.copy_(...)` in eval mode and changes of the base's weight do.
        """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            op = type(self).__name__
            error_msgs.append(f"{op}: {prefix[:-1]} must be unmerged to load weights, got merged")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.invalidate()

    def train(self: _AdapterT, mode: bool = True) -> _AdapterT:
        """As torch's; forgets the cached norm."""
        self._forget_norm()
        return super().train(mode)

    def _apply(
        self: _AdapterT, fn: Callable[[torch.Tensor], Any], recurse: bool = True
    ) -> _AdapterT:
        """As torch's; a cast may have changed W."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.invalidate()
        return self

    def extra_repr(self) -> str:
        """The options."""
        bias = ", lora_bias=True" if self.lora_bias is not None else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"r={self.r}, scaling={self.scaling:g}{dropout}{bias}"
