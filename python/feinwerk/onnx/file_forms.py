"""The same exported graph in other forms, without another trace: contrib operators, or dense ones.

A trace of a large model takes longer than everything else in an export. What a file in Feinwerk's
form holds is enough to write the others, which serve as peers in measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from feinwerk import _checks


def as_contrib(source: str | Path, target: str | Path) -> None:
    """Write a file of ops="feinwerk" once more in the form of ops="contrib", adapters fixed.

    Constants are what ONNX Runtime optimizes best: the stronger peer.

    Args:
        source: the .onnx file.
        target: the file to write.

    Raises:
        ValueError: if `source` has no node of Feinwerk's.
    """
    import onnx_ir as ir

    from feinwerk.onnx.graph_finish import finish

    model = _loaded("as_contrib", source)
    finish(model, "contrib", adapters_are_inputs=False)
    _drop_domain(model)
    ir.save(model, target)


def as_dense(
    source: str | Path, target: str | Path, weight_of: Callable[[str], torch.Tensor]
) -> None:
    """Write a file of ops="feinwerk" once more with dense products, adapters merged in.

    Args:
        source: the .onnx file.
        target: the file to write; its weights go to `<target>.data`.
        weight_of: the dense weight [N, K] of a layer, called with its path.

    Raises:
        ValueError: if `source` has no node of Feinwerk's, or other ones than linear layers.
    """
    import onnx_ir as ir

    from feinwerk.onnx.node_forms import Node

    model = _loaded("as_dense", source)
    graph = model.graph
    for node in [Node(node) for node in graph if node.domain == "feinwerk"]:
        if node.kind not in ("NF4Linear", "NF4LoraLinear", "LoraLinear"):
            rule = "have linear layers only"
            _checks.reject(ValueError, "as_dense", "source", rule, node.kind)
        path, y = node.node.name, node.node.outputs[0]
        weight = weight_of(path).detach().t().contiguous().numpy()
        value = _initializer(graph, f"{path}.dense", weight)
        factors = [node.input("x"), value]
        new = [ir.Node("", "MatMul", factors, num_outputs=1, name=f"{path}/MatMul")]
        if node.input("bias") is not None:
            added = [new[0].outputs[0], node.input("bias")]
            new.append(ir.Node("", "Add", added, num_outputs=1, name=f"{path}/Add"))
        result = new[-1].outputs[0]
        result.shape, result.type = y.shape, y.type
        ir.convenience.replace_nodes_and_values(graph, node.node, [node.node], new, [y], [result])
    _drop_domain(model)
    ir.save(model, target, external_data=f"{Path(target).name}.data")


def _loaded(op: str, source: str | Path) -> Any:
    import onnx_ir as ir

    model = ir.load(source)
    if not any(node.domain == "feinwerk" for node in model.graph):
        _checks.reject(ValueError, op, "source", 'be a file of ops="feinwerk"', str(source))
    for value in model.graph.initializers.values():
        if value.is_graph_input():
            model.graph.inputs.remove(value)
    return model


def _initializer(graph: Any, name: str, array: Any) -> Any:
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def _drop_domain(model: Any) -> None:
    """Take Feinwerk's functions and whatever nothing reads out of a model."""
    for key, function in list(model.functions.items()):
        if function.domain == "feinwerk":
            del model.functions[key]
    model.graph.opset_imports.pop("feinwerk", None)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
