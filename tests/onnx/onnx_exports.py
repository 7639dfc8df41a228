"""Models for tests of the export, and their runs: ONNX Runtime with and without the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from feinwerk import NF4Weight
from feinwerk.nn import DoRALinear, LoRALinear, NF4Linear
from feinwerk.onnx import register
from feinwerk.testing import WeightCase
from feinwerk.testing.adapters import AdapterCase

# What runs a file: ONNX Runtime with the library, without it, and onnx's own evaluator.
WITH, WITHOUT, REFERENCE = "library", "no library", "onnx.reference"
FORMS = {
    "feinwerk": (WITH, WITHOUT, REFERENCE),
    "contrib": (WITHOUT,),
    "portable": (WITHOUT, REFERENCE),
}


class Each(nn.Module):
    """Several layers side by side, each called with its own input."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers.values(), inputs, strict=True)]


def nf4_linear(weight: WeightCase, bias: torch.Tensor | None, dtype: torch.dtype) -> NF4Linear:
    """The layer of a weight."""
    held = NF4Weight(
        weight.packed, weight.absmax, (weight.N, weight.K), weight.blocksize, dtype, *weight.nested
    )
    return NF4Linear.from_weight(held, bias).eval()


def layer_of(case: AdapterCase) -> LoRALinear:
    """The layer that computes a case."""
    (adapter,), dtype = case.adapters, case.x.dtype
    base: nn.Linear
    if isinstance(case.base, WeightCase):
        base = nf4_linear(case.base, case.bias, dtype)
    else:
        base = nn.Linear(case.K, case.N, bias=case.bias is not None, dtype=dtype)
        base.weight.data = case.base.clone()
        if case.bias is not None:
            base.bias.data = case.bias.clone()
    r = adapter.A.shape[0]
    kind = LoRALinear if adapter.magnitude is None else DoRALinear
    layer = kind(base, r, lora_alpha=adapter.s * r, dtype=adapter.A.dtype)
    layer.scaling = adapter.s
    with torch.no_grad():
        layer.lora_A.copy_(adapter.A)
        layer.lora_B.copy_(adapter.B)
        if isinstance(layer, DoRALinear):
            assert adapter.magnitude is not None
            layer.magnitude.copy_(adapter.magnitude)
    return layer.eval()


def session(path: Path, library: bool) -> onnxruntime.InferenceSession:
    """A session on two threads that says only what is wrong."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    if library:
        register(options)
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def to_value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """A tensor of any of our dtypes as ONNX Runtime takes it."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16)
        kind = onnx.TensorProto.BFLOAT16
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def run(
    path: Path, by: str, inputs: tuple[torch.Tensor, ...], **replaced: torch.Tensor
) -> list[torch.Tensor]:
    """Run a file on its inputs, in order, and on values for named ones."""
    if by == REFERENCE:
        evaluator = ReferenceEvaluator(str(path))
        defaults = {tensor.name for tensor in onnx.load(str(path)).graph.initializer}
        names = [name for name in evaluator.input_names if name not in defaults]
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        feeds |= {name: value.numpy() for name, value in replaced.items()}
        return [torch.from_numpy(np.asarray(y)) for y in evaluator.run(None, feeds)]
    held = session(path, by == WITH)
    names = [value.name for value in held.get_inputs()]
    values = {n: to_value(x) for n, x in zip(names, inputs, strict=True)}
    values |= {name: to_value(value) for name, value in replaced.items()}
    outputs = held.run_with_ort_values(None, values)
    return [torch.from_dlpack(y._ortvalue.to_dlpack()).clone() for y in outputs]


def initializers(path: Path) -> dict[str, Any]:
    """The file's initializers by name, as arrays."""
    model = onnx.load(str(path))
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def nodes(path: Path) -> dict[str, Any]:
    """The nodes of our domain by name."""
    model = onnx.load(str(path), load_external_data=False)
    return {node.name: node for node in model.graph.node if node.domain == "feinwerk"}


def as_tensors(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of floats, lists or tensors, fp32."""
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
