"""Reading a model's layers for export: the weight, and the adapter with its gain computed.

Feinwerk's layers are known by class, PEFT's by structure, so that peft is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import Adapter, NF4Embedding, NF4Linear
from feinwerk.nn.dora import DoRA
from feinwerk.nn.lora import is_conv1d
from feinwerk.nn.lora_conv import LoRAConv
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.nn.places import Place, matches, places_of
from feinwerk.onnx.adapter_base import base_of_weight
from feinwerk.onnx.export_checks import OP
from feinwerk.weight import NF4Weight


@dataclass(frozen=True)
class AdapterRoom:
    """Room for adapters that a model does not have yet: inputs whose default is no adapter.

    One exported file then serves every adapter for these layers, LoRA's and, with `dora`, DoRA's.
    Layers that have an adapter keep it as their default.

    Args:
        target_modules: entries as in `feinwerk.nn.add_adapters`: a run of a layer's dotted path
            ("q_proj", "self_attn.v_proj"), or a pattern for the whole path.
        dora: whether there is an input for DoRA's gain as well.

    Example:
        >>> AdapterRoom(("q_proj", "v_proj")).dora
        False
    """

    target_modules: tuple[str, ...] | list[str]
    dora: bool = False

    def covers(self, path: str) -> bool:
        """Whether a layer of this path gets room."""
        return any(matches(entry, path) for entry in self.target_modules)


@dataclass(frozen=True)
class LowRankTensors:
    """An adapter as the graph takes it, fp32; `gain` is None for LoRA and empty for mere room."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: torch.Tensor
    gain: torch.Tensor | None
    lora_bias: torch.Tensor | None
    names: tuple[str, ...]

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]


@dataclass
class ExportLayer:
    """A layer that becomes one of Feinwerk's nodes."""

    path: str
    module: nn.Module
    base: nn.Module
    weight: NF4Weight | torch.Tensor
    bias: torch.Tensor | None
    adapter: LowRankTensors | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_embedding(self) -> bool:
        """Whether it looks rows up."""
        return isinstance(self.base, nn.Embedding)

    @property
    def was(self) -> str:
        """The classes of the layer, for the report."""
        outer, inner = type(self.module).__name__, type(self.base).__name__
        if not isinstance(self.module, Adapter | NF4Module) and self.module is not self.base:
            outer = f"lora.{outer}"  # PEFT's own names are torch's
        return outer if self.module is self.base else f"{outer} over {inner}"


def layers_of(model: nn.Module, room: AdapterRoom | None) -> Iterator[tuple[Place, ExportLayer]]:
    """Every place of every layer that becomes a node of ours; a shared layer comes as the same.

    Raises:
        NotImplementedError: naming the layer that cannot be exported, and why.
    """
    known: dict[int, ExportLayer | None] = {}
    inside: list[str] = []
    for place in places_of(model):
        if any(place.name.startswith(prefix) for prefix in inside):
            continue
        module = place.module
        if id(module) not in known:
            known[id(module)] = read_layer(place.name, module, room)
        layer = known[id(module)]
        if layer is not None:
            inside.append(f"{place.name}.")
            yield place, layer


def read_layer(path: str, module: nn.Module, room: AdapterRoom | None) -> ExportLayer | None:
    """Read one layer; None if it is traced as it is."""
    layer = _read(path, module)
    if room is not None and room.covers(path):
        if layer is None and (_is_dense_linear(module) or _is_dense_table(module)):
            layer = _bare(path, module, module)
        if layer is not None and layer.adapter is None:
            layer.adapter = _empty(layer, room.dora)
        elif layer is not None and room.dora and layer.adapter and layer.adapter.gain is None:
            A = layer.adapter
            none = torch.zeros(0)
            layer.adapter = LowRankTensors(A.A, A.B, A.scaling, none, A.lora_bias, A.names)
    return layer


def _read(path: str, module: nn.Module) -> ExportLayer | None:
    if isinstance(module, LoRAConv):
        return None
    if isinstance(module, Adapter):
        return _feinwerk_adapter(path, module)
    if is_peft_linear(module):
        return _peft_adapter(path, module)
    if isinstance(module, NF4Linear | NF4Embedding):
        return _bare(path, module, module)
    if isinstance(module, NF4Module):
        rule = "be an NF4Linear or NF4Embedding to be exported"
        _checks.reject(NotImplementedError, OP, path, rule, type(module).__name__)
    return None


def _is_dense_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _is_dense_table(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


def _bare(path: str, module: nn.Module, base: nn.Module) -> ExportLayer:
    weight: NF4Weight | torch.Tensor
    if isinstance(base, NF4Module):
        weight = base.nf4_weight
    else:
        parameter = base._parameters["weight"]
        assert parameter is not None
        weight = parameter
        if is_conv1d(base):
            weight = parameter.detach().t().contiguous()
    layer = ExportLayer(path, module, base, weight, base._parameters.get("bias"))
    if getattr(base, "compute", "exact") != "exact":
        layer.notes.append('compute="int8" is exported as the exact product')
    return layer


def _empty(layer: ExportLayer, dora: bool) -> LowRankTensors:
    shape = layer.weight.shape
    N, K = (shape[1], shape[0]) if layer.is_embedding else (shape[0], shape[1])
    gain = torch.zeros(0) if dora else None
    return LowRankTensors(torch.zeros(0, K), torch.zeros(N, 0), torch.zeros(1), gain, None, ())


def _feinwerk_adapter(path: str, module: Adapter) -> ExportLayer:
    base = module.base_layer
    layer = _bare(path, module, base)
    if module._bare:
        layer.notes.append("its adapter is " + ("merged" if module.merged else "switched off"))
        return layer
    gain = None
    with torch.no_grad():
        if isinstance(module, DoRA):
            gain = module._gain().float()
    layer.adapter = _values(
        module.lora_A, module.lora_B, float(module.scaling), gain, module.lora_bias, ("default",)
    )
    return layer


def is_peft_linear(module: nn.Module) -> bool:
    """Whether it has the structure of PEFT's LoRA layer over a linear layer."""
    parts = ("lora_A", "lora_B", "lora_dropout")
    if not all(isinstance(getattr(module, part, None), nn.ModuleDict) for part in parts):
        return False
    base = getattr(module, "base_layer", None)
    has_state = isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "merged")
    return has_state and isinstance(base, nn.Module) and (
        isinstance(base, NF4Linear) or _is_dense_linear(base)
    )  # fmt: skip


def _peft_adapter(path: str, module: Any) -> ExportLayer:
    layer = _bare(path, module, module.base_layer)
    if module.disable_adapters or module.merged:
        layer.notes.append("its adapter is " + ("merged" if module.merged else "switched off"))
        return layer
    active = module.active_adapters
    names = tuple(name for name in active if name in module.lora_A)
    if not names:
        layer.notes.append("no active adapter has this layer")
        return layer
    parts = [_peft_values(path, module, layer.weight, name) for name in names]
    layer.adapter = parts[0] if len(parts) == 1 else _sum(path, parts, names)
    return layer


def _peft_values(
    path: str, module: Any, weight: NF4Weight | torch.Tensor, name: str
) -> LowRankTensors:
    variants = getattr(module, "lora_variant", {})
    variant = variants.get(name) if hasattr(variants, "get") else None
    magnitudes = getattr(module, "lora_magnitude_vector", {})
    dora = name in magnitudes
    if variant is not None and not (dora and type(variant).__name__ == "DoraLinearVariant"):
        rule = f"have a LoRA or DoRA adapter {name!r} to be exported"
        _checks.reject(NotImplementedError, OP, path, rule, type(variant).__name__)
    A, B = module.lora_A[name], module.lora_B[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
        rule = f"have plain linear layers as lora_A and lora_B of adapter {name!r}"
        _checks.reject(
            NotImplementedError, OP, path, rule, f"{type(A).__name__}, {type(B).__name__}"
        )
    scaling, gain = float(module.scaling[name]), None
    if dora:
        magnitude = magnitudes[name].weight
        gain = base_of_weight(weight).gain(magnitude, A.weight.detach(), B.weight.detach(), scaling)
    return _values(A.weight, B.weight, scaling, gain, B.bias, (name,))


def _values(
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    gain: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    names: tuple[str, ...],
) -> LowRankTensors:
    def fp32(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().contiguous()

    factor = torch.tensor([scaling], dtype=torch.float32, device=A.device)
    bias = None if lora_bias is None else fp32(lora_bias)
    return LowRankTensors(
        fp32(A), fp32(B), factor, None if gain is None else fp32(gain), bias, names
    )


def _sum(path: str, parts: list[LowRankTensors], names: tuple[str, ...]) -> LowRankTensors:
    """Several active LoRA adapters add up: they are one adapter of their ranks together."""
    if any(part.gain is not None for part in parts):
        rule = "have one active adapter where one is DoRA"
        _checks.reject(NotImplementedError, OP, path, rule, ", ".join(names))
    A = torch.cat([part.A for part in parts])
    B = torch.cat([part.B * part.scaling for part in parts], dim=1)
    biases = [part.lora_bias * part.scaling for part in parts if part.lora_bias is not None]
    bias = torch.stack(biases).sum(dim=0) if biases else None
    return LowRankTensors(A, B, torch.ones(1, device=A.device), None, bias, names)
