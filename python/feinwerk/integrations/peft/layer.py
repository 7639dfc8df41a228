"""PEFT's LoRA layers with their forward on the fused ops; everything else is PEFT's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS

from feinwerk import _checks
from feinwerk.integrations.peft import base as base_layer
from feinwerk.integrations.peft import merging, route
from feinwerk.integrations.peft.base import FLOAT_DTYPES, Base
from feinwerk.integrations.peft.config import refuse_config
from feinwerk.integrations.peft.norms import NormCache
from feinwerk.integrations.peft.route import Route
from feinwerk.nn import NF4Linear
from feinwerk.nn.merge import MergeReport
from feinwerk.ops import dora_linear, grouped_lora_linear, lora_linear, nf4_linear

# The methods of FusedLayer that call super() find PEFT's layer behind it.
if TYPE_CHECKING:
    _PeftLayer = lora.Linear
else:
    _PeftLayer = object


class FusedLayer(_PeftLayer):
    """What the fused layers add to PEFT's: the forward, and the norms that DoRA needs.

    A layer gets here by `module.__class__ = ...`: there is no constructor, and what a layer
    remembers starts as an attribute of the class.
    """

    fused_name: str = ""
    fused_refusal: str = ""
    _norms: NormCache | None = None

    @property
    def label(self) -> str:
        """How errors name this layer: where it is in its model, if that is known."""
        return self.fused_name or self._get_name()

    def _get_name(self) -> str:
        """PEFT's name of the layer; PEFT's repr puts `lora.` before it."""
        return "Linear"

    @property
    def norms(self) -> NormCache:
        """The norms this layer remembers."""
        if self._norms is None:
            self._norms = NormCache()
        return self._norms

    def forget_norms(self) -> None:
        """Drop every norm; the next forward computes what it needs."""
        if self._norms is not None:
            self._norms.clear()

    def _forget_adapters(self) -> None:
        if self._norms is not None:
            self._norms.forget_adapters()

    def route(self, adapter_names: list[str] | None = None) -> Route:
        """The way the next forward takes, as the layer stands."""
        return route.find(self, adapter_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what PEFT's layer returns, by the fused ops where they cover its state."""
        adapter_names = kwargs.get("adapter_names")
        way = self.route(adapter_names)
        refusal = _refusal(x, args, kwargs)
        if way.op == "" or (refusal and way.op != "base"):
            self._note(refusal)
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        self._note("")
        self._check_forward_args(x, *args, **kwargs)
        if way.op == "base":
            kwargs = {
                k: v for k, v in kwargs.items() if k not in ("adapter_names", *VARIANT_KWARG_KEYS)
            }
            return self._base_alone(x, *args, **kwargs)
        if torch.compiler.is_compiling():  # shapes are checked by the ops, while tracing
            return self._fused(x, way, adapter_names)
        try:
            return self._fused(x, way, adapter_names)
        except (IndexError, TypeError, ValueError) as error:
            if str(error).startswith(f"{self.label}: "):
                raise
            raise type(error)(f"{self.label}: {error}") from error

    def _note(self, refusal: str) -> None:
        """Remember for `explain` why an input was left to PEFT."""
        if refusal != self.fused_refusal and not torch.compiler.is_compiling():
            self.fused_refusal = refusal

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """PEFT's checks, which refuse DoRA in a mixed batch: let it pass where it is fused."""
        names = kwargs.get("adapter_names")
        if names is not None and not self.merged and self.route(names).op:
            names = [route.NO_ADAPTER] * len(names)
        checked = {**kwargs, "adapter_names": names}
        super()._check_forward_args(x, *args, **checked)  # type: ignore[no-untyped-call]

    def _base_alone(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.base_layer
        # In eval mode bitsandbytes would repack its bytes, and the fused ops could not read them.
        if base_layer.is_bitsandbytes(base) and not _refusal(x, args, kwargs):
            read = base_layer.read(base)
            if not isinstance(read, str):
                assert read.absmax is not None
                y = nf4_linear(
                    x, read.weight, read.absmax, read.bias, read.nested_absmax,
                    read.nested_codebook, read.nested_offset, N=read.shape[0], K=read.shape[1],
                    blocksize=read.blocksize,
                )  # fmt: skip
                return y.to(x.dtype)
        result: torch.Tensor = base(x, *args, **kwargs)
        return result

    def _fused(self, x: torch.Tensor, way: Route, adapter_names: list[str] | None) -> torch.Tensor:
        base = way.base
        assert base is not None
        mixed = base.absmax is None and x.dtype is not base.dtype
        if mixed and not torch.is_autocast_enabled(x.device.type):
            rule = f"have the base weight's dtype, {base.dtype}"
            _checks.reject(TypeError, self.label, "x", rule, x.dtype)
        if adapter_names is not None:
            y = self._mixed(x, base, way.adapters, adapter_names)
        elif way.op == "dora_linear":
            y = self._dora(x, base, way.adapters[0])
        else:
            y = self._lora(x, base, way.adapters)
        return y.to(x.dtype) if base.restores_dtype else y

    def _lora(self, x: torch.Tensor, base: Base, names: tuple[str, ...]) -> torch.Tensor:
        first, *more = (route.adapter(self, name, base) for name in names)
        A, B, scaling, bias = first.A, first.B, first.scaling, first.bias
        if more:  # they add up, so they are one adapter of their ranks together
            parts = [first, *more]
            A = torch.cat([part.A for part in parts])
            B = torch.cat([part.B * part.scaling for part in parts], dim=1)
            scaling, bias = 1.0, None
            for part in parts:
                if part.bias is not None:
                    own = part.bias * part.scaling
                    bias = own if bias is None else bias + own
        return lora_linear(
            x, base.weight, A, B, base.bias, bias, **base.tables, scaling=scaling,
            dropout_p=first.dropout_p, blocksize=base.blocksize, compute=base.compute,
        )  # fmt: skip

    def _dora(self, x: torch.Tensor, base: Base, name: str) -> torch.Tensor:
        part = route.adapter(self, name, base)
        assert part.magnitude is not None
        norm = None
        if self._norms_may_be_kept():
            norm = self.norms.weight_norm(name, base, part.A, part.B, part.scaling)
        return dora_linear(
            x, base.weight, part.A, part.B, part.magnitude, base.bias, **base.tables,
            base_norm=self.norms.base_norm(base), weight_norm=norm, scaling=part.scaling,
            dropout_p=part.dropout_p, blocksize=base.blocksize, compute=base.compute,
        )  # fmt: skip

    def _mixed(
        self, x: torch.Tensor, base: Base, names: tuple[str, ...], adapter_names: list[str]
    ) -> torch.Tensor:
        parts = [route.adapter(self, name, base) for name in names]
        places = {name: i for i, name in enumerate(names)}
        # An adapter that this layer does not have leaves the layer as it is, as in PEFT.
        rows = [places.get(name, -1) for name in adapter_names]
        index = torch.tensor(rows, dtype=torch.int64, device=x.device)
        dora = any(part.magnitude is not None for part in parts)
        norms = None
        if dora and self._norms_may_be_kept():
            norms = [
                None if part.magnitude is None
                else self.norms.weight_norm(name, base, part.A, part.B, part.scaling)
                for name, part in zip(names, parts, strict=True)
            ]  # fmt: skip
        y = grouped_lora_linear(
            x, base.weight, [part.A for part in parts], [part.B for part in parts], index,
            base.bias, **base.tables, scaling=[part.scaling for part in parts],
            magnitude=[part.magnitude for part in parts],
            base_norm=self.norms.base_norm(base) if dora else None, weight_norm=norms,
            dropout_p=parts[0].dropout_p, blocksize=base.blocksize, compute=base.compute,
        )  # fmt: skip
        if all(part.bias is None for part in parts):
            return y
        zero = torch.zeros(base.shape[0], device=x.device)
        extra = [zero if p.bias is None else p.scaling * p.bias.float() for p in parts]
        table = torch.stack([*extra, zero])[index]  # -1 is the last row
        return (y + table.view(len(rows), *[1] * (y.dim() - 2), -1)).to(y.dtype)

    def _norms_may_be_kept(self) -> bool:
        return not (
            self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        )  # fmt: skip

    # Where PEFT or torch may change a weight, what was made from it is forgotten.

    def train(self, mode: bool = True) -> Any:
        """As always; norms with adapters are kept in eval mode only."""
        if mode:
            self._forget_adapters()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget_norms()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_norms()
        super()._load_from_state_dict(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, after a check of the config; some initializations change the base weight."""
        label = kwargs.get("target_name") or self.label
        refuse_config(label, self.get_base_layer(), kwargs["config"])
        self.forget_norms()
        super().update_layer(*args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's."""
        self._forget_adapters()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's."""
        self._forget_adapters()
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's."""
        self.forget_norms()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """PEFT's."""
        self.forget_norms()
        super().unmerge()


class FusedLinear(FusedLayer, lora.Linear):
    """`peft.tuners.lora.Linear` over torch.nn.Linear or NF4Linear, on the fused ops."""

    nf4_merge: merging.NF4Merge | None = None

    @property
    def merge_report(self) -> MergeReport | None:
        """The error that merging into an NF4 base has added; None while nothing is merged."""
        return None if self.nf4_merge is None else self.nf4_merge.report

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, and over NF4Linear the re-quantized sum, reported; always checked first there."""
        if not isinstance(self.get_base_layer(), NF4Linear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        self.forget_norms()
        merging.merge(self, adapter_names)

    def unmerge(self) -> None:
        """PEFT's, and over NF4Linear the original codes, bit for bit."""
        if self.nf4_merge is not None and isinstance(self.get_base_layer(), NF4Linear):
            self.forget_norms()
            merging.unmerge(self)
            return
        self.nf4_merge = None
        super().unmerge()


def _refusal(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call is left to PEFT whatever the layer's state; empty if it is not."""
    if args or set(kwargs) - {"adapter_names", *VARIANT_KWARG_KEYS}:
        return "the last call passed more than x to the base layer"
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"the last x was a {type(x).__name__}"
    if x.dtype not in FLOAT_DTYPES:
        return f"the last x was {x.dtype}"
    if not 1 <= x.dim() <= 4:
        return f"the last x had {x.dim()} dimensions"
    return ""
