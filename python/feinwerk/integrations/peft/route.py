"""Which way a layer's forward takes, and why: the fused ops, the base alone, or PEFT's own code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from feinwerk import _checks
from feinwerk.integrations.peft import base as base_layer
from feinwerk.integrations.peft.base import FLOAT_DTYPES, Base, is_plain

NO_ADAPTER = "__base__"


class Route(NamedTuple):
    """`op` names the fused op, "base" the base layer alone, and "" PEFT's own forward."""

    op: str
    why: str
    base: Base | None = None
    adapters: tuple[str, ...] = ()


class Adapter(NamedTuple):
    """One adapter of one layer, checked against its base."""

    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    scaling: float | torch.Tensor
    magnitude: torch.Tensor | None
    dropout_p: float


def find(layer: Any, adapter_names: list[str] | None = None, sharded: bool = False) -> Route:
    """Decide from the layer's state alone, before any input is looked at.

    With `sharded`, as in a forward whose weights fully_shard has gathered.
    """
    if layer.disable_adapters:
        return Route("base", "adapters are disabled")
    if layer.merged:
        return Route("base", f"merged: {', '.join(layer.merged_adapters)}")
    here = layer.lora_A
    if adapter_names is None:
        names = tuple(name for name in layer.active_adapters if name in here)
    else:
        names = tuple(name for name in dict.fromkeys(adapter_names) if name in here)
    if not names:
        return Route("base", "no active adapter has this layer")
    base = base_layer.read(layer.base_layer, sharded)
    if isinstance(base, str):
        return Route("", base)
    for name in names:
        reason = refusal(layer, name, sharded)
        if reason:
            return Route("", f"adapter {name!r}: {reason}")
    if adapter_names is not None:
        rates = {dropout_p(layer, name) for name in names}
        if len(rates) > 1:
            return Route("", "a mixed batch whose adapters drop out at different rates")
        return Route("grouped_lora_linear", f"mixed batch of {_listed(names)}", base, names)
    dora = [name for name in names if name in layer.lora_variant]
    if len(names) > 1:
        if dora:
            return Route("", f"{len(names)} active adapters, one of them DoRA")
        if any(dropout_p(layer, name) for name in names):
            return Route("", f"{len(names)} active adapters with dropout, each a mask of its own")
    op = "dora_linear" if dora else "lora_linear"
    return Route(op, _listed(names), base, names)


def _listed(names: tuple[str, ...]) -> str:
    return ("adapter " if len(names) == 1 else "adapters ") + ", ".join(map(repr, names))


def refusal(layer: Any, name: str, sharded: bool = False) -> str:
    """Why the fused ops do not compute this adapter; empty if they do."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"{type(variant).__name__} is not fused"
    parts = [layer.lora_A[name], layer.lora_B[name]]
    if not all(is_plain(part, nn.Linear) for part in parts):
        return "lora_A or lora_B has hooks or is not a plain Linear"
    if not is_plain(layer.lora_dropout[name], nn.Identity, nn.Dropout):
        return f"dropout is a {type(layer.lora_dropout[name]).__name__} or has hooks"
    if variant is not None:
        parts.append(layer.lora_magnitude_vector[name])
        if not is_plain(parts[-1], DoraLinearLayer):
            return "the magnitude has hooks or is not PEFT's"
    for part in parts:
        weight = part.weight
        if not base_layer.is_tensor(weight, sharded):
            return f"its weight is a {type(weight).__name__}"
        if weight.dtype not in FLOAT_DTYPES:
            return f"its weight is {weight.dtype}"
        if weight.is_meta:
            return "its weight is on the meta device"
    if parts[0].bias is not None:
        return "lora_A has a bias"
    if dropout_p(layer, name) >= 1:
        return "dropout drops everything"
    return ""


def dropout_p(layer: Any, name: str) -> float:
    """The rate at which the adapter's input is dropped now; 0 outside training."""
    dropout = layer.lora_dropout[name]
    if type(dropout) is not nn.Dropout or not dropout.training:
        return 0.0
    # PEFT's DoRA asks the layer, not the dropout module.
    return float(dropout.p) if layer.training or name not in layer.lora_variant else 0.0


def adapter(layer: Any, name: str, base: Base, label: str = "") -> Adapter:
    """Collect an adapter's tensors; a ValueError names the layer when they do not fit the base."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name]
    N, K = base.shape
    label = label or layer.label
    if A.dim() != 2 or A.shape[1] != K:
        rule = f"have shape (r, {K}) for this base layer"
        _checks.reject(ValueError, label, f"lora_A of adapter {name!r}", rule, tuple(A.shape))
    if tuple(B.weight.shape) != (N, A.shape[0]):
        rule = f"have shape ({N}, {A.shape[0]}) for this base layer and lora_A"
        got = tuple(B.weight.shape)
        _checks.reject(ValueError, label, f"lora_B of adapter {name!r}", rule, got)
    magnitude = None
    if name in layer.lora_variant:
        magnitude = layer.lora_magnitude_vector[name].weight
        if tuple(magnitude.shape) != (N,):
            got = tuple(magnitude.shape)
            what = f"magnitude of adapter {name!r}"
            _checks.reject(ValueError, label, what, f"have shape ({N},)", got)
    scaling = layer.scaling[name]
    if not _is_finite(scaling):
        _checks.reject(ValueError, label, f"scaling of adapter {name!r}", "be finite", scaling)
    return Adapter(A, B.weight, B.bias, scaling, magnitude, dropout_p(layer, name))


def _is_finite(scaling: float | torch.Tensor) -> bool:
    if isinstance(scaling, torch.Tensor):
        # Reading a value would break a graph, and wait for another device.
        if torch.compiler.is_compiling() or scaling.device.type != "cpu":
            return True
        return bool(scaling.isfinite())
    return abs(scaling) < float("inf")
