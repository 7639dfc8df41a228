"""The weight below an adapter, out of a torch model or an exported graph, for DoRA's row norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import Adapter, NF4Linear
from feinwerk.nn.lora import is_conv1d
from feinwerk.onnx.adapter_inputs import AdapterInputs
from feinwerk.onnx.export_checks import unwrapped
from feinwerk.onnx.node_forms import INPUTS, NESTED
from feinwerk.ops import row_norms, weight_norm
from feinwerk.weight import NF4Weight

_Tables = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Base:
    """A weight as the ops take it: [N, K], or packed codes with their tables."""

    weight: torch.Tensor
    tables: _Tables
    shape: tuple[int, int]
    blocksize: int = 64
    dtype: torch.dtype | None = None  # what W is rounded to, as in `feinwerk.weight_norm`

    def gain(
        self, magnitude: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return magnitude / ||W + scaling B A||, fp32 [N], by the steps of DoRALinear."""
        options: Any = {"blocksize": self.blocksize, "dtype": self.dtype}
        with torch.no_grad():
            base_norm = row_norms(self.weight, *self.tables, shape=self.shape, **options)
            norm = weight_norm(
                self.weight, A, B, *self.tables, scaling=scaling, base_norm=base_norm, **options
            )
        return gain_of(magnitude, norm)


_NO_TABLES: _Tables = (None, None, None, None)


def gain_of(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """One division in fp32; 0 for a row of norm zero, which has no direction."""
    return torch.where(norm > 0, magnitude.detach().float() / norm, 0.0)


def base_of_weight(weight: NF4Weight | torch.Tensor) -> Base:
    """A weight [N, K] as it stands."""
    if isinstance(weight, NF4Weight):
        tables = (weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.nested_offset)
        rows, columns = weight.shape
        return Base(weight.packed, tables, (rows, columns), weight.blocksize, weight.dtype)
    return Base(weight.detach(), _NO_TABLES, (weight.shape[0], weight.shape[1]))


def layer_of_module(op: str, model: nn.Module, name: str) -> nn.Module:
    """The layer of a torch model below whatever adapter it has.

    Args:
        op: who asks, for messages.
        model: Feinwerk's, a plain one, or one that PEFT has wrapped.
        name: the layer's path in the model that PEFT wrapped.

    Returns:
        A linear layer or an embedding, dense or NF4.

    Raises:
        ValueError: if there is no such layer.
        TypeError: if it is of another kind.
    """
    wrapped = unwrapped(model)
    try:
        layer: nn.Module = wrapped.get_submodule(name)
    except AttributeError:
        rule = f"be a layer of {type(wrapped).__name__}"
        _checks.reject(ValueError, op, name, rule, "none of that name")
    while isinstance(layer, Adapter) or "base_layer" in layer._modules:
        layer = layer.get_submodule("base_layer")
    if not isinstance(layer, nn.Linear | nn.Embedding) and not is_conv1d(layer):
        rule = "be a linear layer or an embedding"
        _checks.reject(TypeError, op, name, rule, type(layer).__name__)
    return layer


def sizes_of_module(layer: nn.Module) -> tuple[int, int]:
    """N and K as lora_B [N, r] and lora_A [r, K] see them; an embedding is K rows of N."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    K, N = layer.get_parameter("weight").shape
    return N, K


def base_of_module(layer: nn.Module) -> Base:
    """The weight of a linear layer, on CPU."""
    if isinstance(layer, NF4Linear):
        return base_of_weight(layer.nf4_weight.to("cpu"))
    weight = layer.get_parameter("weight").cpu()
    return base_of_weight(weight.t().contiguous() if is_conv1d(layer) else weight)


def base_of_graph(op: str, graph: AdapterInputs, name: str) -> Base:
    """The weight of the node that takes a layer's adapter inputs, read from the file.

    Args:
        op: who asks, for messages.
        graph: the exported graph.
        name: the layer.

    Returns:
        The weight; of the external data only its own bytes are read.

    Raises:
        ValueError: if no node of Feinwerk's takes the inputs, or its weight is no initializer.
    """
    for node in graph.model.graph.node:
        if f"{name}.lora_A" in node.input and node.domain == "feinwerk":
            if node.op_type == "NF4LoraLinear":
                return _nf4_base(op, graph, name, node)
            if node.op_type == "LoraLinear":
                return base_of_weight(_tensor(op, graph, name, node.input[1]))
    rule = 'name a graph of ops="feinwerk" for a folder with DoRA, which needs W (or load the '
    rule += "folder by feinwerk.nn.load_adapter, and save that model)"
    got = f"no NF4LoraLinear or LoraLinear that takes {name}.lora_A"
    _checks.reject(ValueError, op, "model", rule, got)


def _nf4_base(op: str, graph: AdapterInputs, name: str, node: Any) -> Base:
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    keys = dict(zip(INPUTS[node.op_type], node.input, strict=False))
    packed, absmax = (_tensor(op, graph, name, keys[part]) for part in ("packed", "absmax"))
    nested: list[torch.Tensor | None] = [
        _tensor(op, graph, name, keys[part]) if keys.get(part) else None for part in NESTED
    ]
    if nested[2] is not None:
        nested[2] = nested[2].reshape(())
    shape = sizes["N"], sizes["K"]
    return Base(packed, (absmax, *nested), shape, sizes.get("block_size", 64))


def _tensor(op: str, graph: AdapterInputs, name: str, key: str) -> torch.Tensor:
    """An initializer as a tensor; numpy has no bfloat16, so those bits are taken as int16."""
    import numpy
    import onnx

    for tensor in graph.model.graph.initializer:
        if tensor.name == key:
            array = onnx.numpy_helper.to_array(tensor, str(graph.path.parent))
            if tensor.data_type == onnx.TensorProto.BFLOAT16:
                bits = torch.from_numpy(array.view(numpy.int16).copy())
                return bits.view(torch.bfloat16)
            return torch.from_numpy(array.copy())
    rule = f"have its weight as an initializer of {graph.path.name}"
    _checks.reject(ValueError, op, name, rule, repr(key))
