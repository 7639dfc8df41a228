"""Export-only modules that stand in a model where its adapter and NF4 layers were, for one trace.

In a trace each is a single symbolic node of the `feinwerk` domain, with the layer's path as an
attribute; graph_finish.py makes the final nodes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import DoRAConv
from feinwerk.nn.places import Place, places_of
from feinwerk.onnx.export_checks import OP
from feinwerk.onnx.export_layers import ExportLayer
from feinwerk.onnx.node_forms import DOMAIN, LOW_RANK, NESTED
from feinwerk.weight import NF4Weight

VERSION = 1
# An addition to rows of a table: no op of the library's, always written in standard operators.
LORA_EMBEDDING = "LoraEmbedding"
NF4_PARTS = ("packed", "absmax", *NESTED)
_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


class StandIn(nn.Module):
    """One layer as symbolic nodes; what other code asks of it, the original answers."""

    def __init__(self, layer: ExportLayer, flat: dict[int, torch.Tensor]) -> None:
        """Hold the layer's tensors, each once in a model: `flat` knows those of other layers."""
        super().__init__()
        self.path, self.is_embedding = layer.path, layer.is_embedding
        weight = layer.weight
        if isinstance(weight, NF4Weight):
            self.attributes = {
                "N": weight.shape[0], "K": weight.shape[1], "block_size": weight.blocksize
            }  # fmt: skip
            self.out_dtype = weight.dtype
            for name in NF4_PARTS:
                tensor = getattr(weight, name)
                if name == "packed":
                    tensor = flat.setdefault(id(tensor), tensor.detach().reshape(-1))
                self.register_buffer(name, tensor, persistent=False)
        else:
            self.attributes = {}
            # The same object as in the model: the exporter writes what is tied only once.
            if isinstance(weight, nn.Parameter):
                self.register_parameter("dense", weight)
            else:
                self.register_buffer("dense", weight, persistent=False)
        adapter = layer.adapter
        for name, tensor in zip(
            LOW_RANK,
            (None,) * 4 if adapter is None
            else (adapter.A, adapter.B, adapter.scaling, adapter.gain),
            strict=True,
        ):  # fmt: skip
            self.register_buffer(name, tensor, persistent=False)
        bias = None if layer.bias is None else layer.bias.detach()
        if adapter is not None and adapter.lora_bias is not None:
            extra = adapter.scaling * adapter.lora_bias
            bias = extra if bias is None else bias.float() + extra
        self.register_buffer("bias", bias, persistent=False)
        self.eval()
        # Not a child: it is no part of what is traced.
        self.__dict__["original"] = layer.module

    def __getattr__(self, name: str) -> Any:
        """As torch's; then the original's, as code around the model may ask for its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    def _node(
        self, op: str, inputs: Sequence[torch.Tensor | None], dtype: torch.dtype, columns: int,
        rows: Sequence[Any], **attributes: int,
    ) -> torch.Tensor:  # fmt: skip
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{op}", inputs, {**attributes, "path": self.path}, dtype=dtype,
            shape=(*rows, columns), version=VERSION,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the node's value; arguments beside x are PEFT's, for adapters chosen by row."""
        return self._rows(x) if self.is_embedding else self._linear(x)

    def _adapter(self) -> list[torch.Tensor | None]:
        return [getattr(self, name) for name in LOW_RANK]

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        K = self.attributes["K"] if self.attributes else self.dense.shape[1]
        # In a trace this also says that the dimension is no free one.
        if x.shape[-1] != K:
            _checks.reject(ValueError, OP, self.path, f"get K = {K} columns", tuple(x.shape))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        nested = [self._buffers.get(name) for name in NESTED]
        adapter = self._adapter()
        if not self.attributes:
            N = self.dense.shape[0]
            inputs = [x, self.dense.to(x.dtype), *adapter, bias]
            return self._node("LoraLinear", inputs, x.dtype, N, x.shape[:-1])
        N, weight = self.attributes["N"], [self.packed, self.absmax]
        if self.lora_A is None:
            inputs = [x, *weight, bias, *nested]
            return self._node("NF4Linear", inputs, x.dtype, N, x.shape[:-1], **self.attributes)
        inputs = [x, *weight, *adapter, bias, *nested]
        return self._node("NF4LoraLinear", inputs, x.dtype, N, x.shape[:-1], **self.attributes)

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        indices = indices.to(torch.int64)
        if self.attributes:
            inputs = [indices, *(self._buffers.get(name) for name in NF4_PARTS)]
            dtype, K = self.out_dtype, self.attributes["K"]
            options = {**self.attributes, "to": _ONNX_TYPES[dtype]}
            rows = self._node("NF4Embedding", inputs, dtype, K, indices.shape, **options)
        else:
            rows = nn.functional.embedding(indices, self.dense)
        if self.lora_A is None:
            return rows
        inputs = [rows, indices, *self._adapter()]
        return self._node(LORA_EMBEDDING, inputs, rows.dtype, rows.shape[-1], indices.shape)


class ConvStandIn(nn.Module):
    """A DoRA convolution in plain torch, its gain computed ahead: a constant of the file."""

    gain: torch.Tensor

    def __init__(self, layer: DoRAConv) -> None:
        """Compute the gain."""
        super().__init__()
        self.layer = layer
        sizes = (-1, *(1,) * (layer.lora_A.dim() - 2))
        with torch.no_grad():
            self.register_buffer("gain", layer._gain().view(sizes), persistent=False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return gain * (conv(x, W) + addition(x)) + bias."""
        y: torch.Tensor = self.layer.base_layer(x)
        bias = self.layer.bias
        product = y if bias is None else y - bias.view(self.gain.shape)
        sum_ = y + (self.gain - 1) * product + self.gain * self.layer._addition(x)
        return sum_.to(y.dtype)


@contextmanager
def standing_in(
    model: nn.Module, layers: Sequence[tuple[Place, ExportLayer]]
) -> Iterator[nn.Module]:
    """Put the stand-ins into the model's places; whatever happens, the layers come back."""
    made: dict[int, StandIn] = {}
    flat: dict[int, torch.Tensor] = {}
    replaced: list[tuple[Place, nn.Module]] = []
    convolutions = [
        place for place in places_of(model)
        if isinstance(place.module, DoRAConv) and not place.module._bare
    ]  # fmt: skip
    try:
        for place in convolutions:
            module = place.module
            assert isinstance(module, DoRAConv)
            replaced.append((place, module))
            place.parent._modules[place.attribute] = ConvStandIn(module)
        for place, layer in layers:
            if id(layer) not in made:
                made[id(layer)] = StandIn(layer, flat)
            replaced.append((place, place.module))
            place.parent._modules[place.attribute] = made[id(layer)]
        yield model
    finally:
        for place, module in reversed(replaced):
            place.parent._modules[place.attribute] = module
