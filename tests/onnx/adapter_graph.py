"""A small graph with adapter inputs, made of standard ops: y = gain (x W^T + s x A^T B^T) + b."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

F32 = TensorProto.FLOAT


def initializer(name: str, value: Any) -> Any:
    return numpy_helper.from_array(numpy.ascontiguousarray(value), name)


def _layer(
    name: str, layer: nn.Linear, x: str, dora: bool, defaults: dict[str, Any]
) -> tuple[list[Any], list[Any], str]:
    """The nodes, initializers and output of one layer."""
    N, K = layer.out_features, layer.in_features
    parts = {
        "lora_A": numpy.zeros((0, K), "f4"),
        "lora_B": numpy.zeros((N, 0), "f4"),
        "scaling": numpy.ones(1, "f4"),
    }
    if dora:
        parts["gain"] = numpy.zeros(0, "f4")
    held = [
        initializer(f"{name}.{part}", defaults.get(f"{name}.{part}", value))
        for part, value in parts.items()
    ]
    held.append(initializer(f"{name}.W", layer.weight.detach().numpy().T))
    nodes: list[Any] = []

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{name}/{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    y = node("MatMul", x, f"{name}.W")
    down = node("MatMul", x, node("Transpose", f"{name}.lora_A", perm=[1, 0]))
    up = node("MatMul", down, node("Transpose", f"{name}.lora_B", perm=[1, 0]))
    y = node("Add", y, node("Mul", up, f"{name}.scaling"))
    if dora:  # a gain of no elements is none
        held += [
            initializer(f"{name}.ones", numpy.ones(N, "f4")),
            initializer(f"{name}.from", numpy.array([0])),
            initializer(f"{name}.to", numpy.array([N])),
        ]
        gains = node("Concat", f"{name}.gain", f"{name}.ones", axis=0)
        y = node("Mul", y, node("Slice", gains, f"{name}.from", f"{name}.to"))
    if layer.bias is not None:
        held.append(initializer(f"{name}.bias", layer.bias.detach().numpy()))
        y = node("Add", y, f"{name}.bias")
    return nodes, held, y


def write_graph(
    layers: dict[str, nn.Linear],
    path: Path,
    *,
    dora: bool = True,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Write the layers, one after the other, as an .onnx file with the fixed input names.

    `defaults` are the values of adapter inputs that do not start at rank 0.
    """
    nodes, held, x = [], [], "x"
    inputs = [helper.make_tensor_value_info("x", F32, ["rows", "K"])]
    for name, layer in layers.items():
        more, parts, x = _layer(name, layer, x, dora, defaults or {})
        nodes += more
        held += parts
        shapes: dict[str, list[Any]] = {
            "lora_A": [f"{name}.r", layer.in_features],
            "lora_B": [layer.out_features, f"{name}.r"],
            "scaling": [1],
            "gain": [f"{name}.gains"],
        }
        names = {tensor.name for tensor in parts}
        inputs += [
            helper.make_tensor_value_info(f"{name}.{part}", F32, shape)
            for part, shape in shapes.items()
            if f"{name}.{part}" in names
        ]
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    output = helper.make_tensor_value_info("y", F32, ["rows", "N"])
    graph = helper.make_graph(nodes, "layers", inputs, [output], held)
    imports = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
