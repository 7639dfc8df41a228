"""From the traced graph to the file's: names, adapter inputs, and the form of Feinwerk's nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from feinwerk.onnx.export_report import NodeReport
from feinwerk.onnx.graph_writer import GraphWriter
from feinwerk.onnx.node_forms import (
    DOMAIN,
    INPUTS,
    LOW_RANK,
    Node,
    function_of,
    why_not_contrib,
    write_contrib,
    write_standard,
)

STANDARD_ONLY = ("LoraEmbedding",)


@dataclass
class Finished:
    """What the graph consists of."""

    nodes: list[NodeReport]
    adapter_inputs: list[str]
    overloads: bool


def finish(model: Any, ops: str, adapters_are_inputs: bool) -> Finished:
    """Give the nodes of a traced model their names and their final form, in place.

    Args:
        model: an onnx_ir model; its nodes of our domain have the attribute `path`.
        ops: "feinwerk", "contrib" or "portable".
        adapters_are_inputs: whether adapters become graph inputs with defaults.

    Returns:
        What became of every node.
    """
    graph = model.graph
    nodes = [Node(node) for node in graph if node.domain == DOMAIN]
    calls: Counter[tuple[str, str]] = Counter()
    inputs: list[str] = []
    for node in nodes:
        node.path = path = _take_path(node)
        if not path:
            continue
        node.node.name = path if node.kind != "LoraEmbedding" else f"{path}.addition"
        # A layer that is called again has nodes of the same tensors, told apart by a number.
        count = calls[path, node.kind]
        calls[path, node.kind] += 1
        node.node.name += f"_{count}" if count else ""
        _name_tensors(graph, node, path)
        if adapters_are_inputs and node.input("lora_A") is not None:
            inputs += _to_inputs(graph, node, path)
    _fix_columns(graph, nodes)
    reports = [_report(node, ops) for node in nodes]
    custom = [node for node in nodes if ops == "feinwerk" and node.kind not in STANDARD_ONLY]
    _rewrite(model, [node for node in nodes if node not in custom], ops)
    overloads = _add_functions(model, custom)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
            graph.initializers.pop(value.name)
    return Finished(reports, inputs, overloads)


def _fix_columns(graph: Any, nodes: list[Node]) -> None:
    """Write K where the trace has left a name for the size that a layer's weight fixes."""
    import onnx_ir as ir

    known: dict[str, int] = {}
    for node in nodes:
        x = node.input("x")
        if x is not None and x.shape is not None and not isinstance(x.shape[-1], int):
            dense = node.kind == "LoraLinear"
            K = node.input("weight").shape[1] if dense else node.size("K")
            known[str(x.shape[-1].value)] = int(K)
    known.pop("None", None)  # a size without a name
    if not known:
        return
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                size if isinstance(size, int) else known.get(str(size.value), size)
                for size in value.shape
            )


def _take_path(node: Node) -> str:
    attribute = node.node.attributes.pop("path", None)
    return "" if attribute is None else str(attribute.value)


def _name_tensors(graph: Any, node: Node, path: str) -> None:
    """Name the node's initializers after the layer; a tied one keeps the name it got first."""
    for name in INPUTS[node.kind]:
        value = node.input(name)
        if value is None or not value.is_initializer() or name in ("x", "rows", "indices"):
            continue
        if "feinwerk.named" in value.metadata_props:
            continue
        graph.initializers.pop(value.name)
        _make_free(graph, f"{path}.{name}")
        value.name = f"{path}.{name}"
        value.const_value.name = value.name
        value.metadata_props["feinwerk.named"] = path
        graph.initializers[value.name] = value


def _make_free(graph: Any, name: str) -> None:
    """Rename what has a layer's name, as a tensor of a wrapper around the model may."""
    other = graph.initializers.pop(name, None)
    if other is None:
        return
    free = f"{name}.outer"
    while free in graph.initializers:
        free += "_"
    other.name = other.const_value.name = free
    graph.initializers[free] = other


def _to_inputs(graph: Any, node: Node, path: str) -> list[str]:
    import onnx_ir as ir

    added = []
    for name in LOW_RANK:
        value = node.input(name)
        if value is None:
            continue
        if value.name != f"{path}.{name}":
            # The exporter makes small equal tensors one; every layer's adapter is its own.
            value = _own(graph, node, name, f"{path}.{name}")
        if value.is_graph_input():
            continue
        sizes = list(value.const_value.shape)
        if name == "lora_A":
            sizes[0] = f"{path}.r"
        elif name == "lora_B":
            sizes[1] = f"{path}.r"
        elif name == "gain":
            sizes[0] = f"{path}.gain_size"
        value.shape = ir.Shape(sizes)
        graph.inputs.append(value)
        added.append(value.name)
    return added


def _own(graph: Any, node: Node, name: str, full_name: str) -> Any:
    """Give a node's input an initializer of its own, or the one that the name has already."""
    import onnx_ir as ir

    value = graph.initializers.get(full_name)
    if value is None:
        shared = node.input(name).const_value
        tensor = ir.Tensor(shared.numpy(), dtype=shared.dtype, name=full_name)
        kind = ir.TensorType(shared.dtype)
        value = ir.Value(name=full_name, shape=tensor.shape, type=kind, const_value=tensor)
        graph.initializers[full_name] = value
    node.set(name, value)
    return value


def _report(node: Node, ops: str) -> NodeReport:
    became, why = f"{DOMAIN}::{node.kind}", ""
    if node.kind in STANDARD_ONLY:
        became, why = "standard operators", "no operator of the library's"
    elif ops == "portable":
        became = "standard operators"
    elif ops == "contrib":
        why = why_not_contrib(node)
        became = "standard operators" if why else "com.microsoft::MatMulBnb4"
    return NodeReport(node.path or node.node.name, node.kind, became, why)


def _rewrite(model: Any, nodes: list[Node], ops: str) -> None:
    """Replace nodes by standard ones, or by ONNX Runtime's own."""
    import onnx_ir as ir

    graph = model.graph
    for node in nodes:
        w = GraphWriter(graph)
        contrib = ops == "contrib" and not why_not_contrib(node)
        value = write_contrib(w, node) if contrib else write_standard(w, node)
        if contrib:
            graph.opset_imports["com.microsoft"] = 1
        for index, new in enumerate(w.nodes):
            new.name = f"{node.node.name}/{new.op_type}_{index}"
        old = node.node.outputs[0]
        value.shape, value.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(
            graph, node.node, [node.node], w.nodes, [old], [value]
        )


def _add_functions(model: Any, nodes: list[Node]) -> bool:
    """Add a function for every form of node; return whether two share a name.

    All nodes of an operation with one kind of absmax share a function, so they get the same inputs;
    the other kind, if a model mixes them, is told apart by its overload.
    """
    forms: dict[tuple[str, bool], list[Node]] = {}
    for node in nodes:
        forms.setdefault((node.kind, node.nested), []).append(node)
    opset = model.graph.opset_imports[""]
    mixed = False
    for (kind, nested), members in forms.items():
        other = forms.get((kind, not nested), [])
        second = bool(other) and (len(members), nested) < (len(other), not nested)
        overload = ("nested" if nested else "plain") if second else ""
        mixed = mixed or second
        present = tuple(
            name for name in INPUTS[kind] if any(node.input(name) is not None for node in members)
        )
        for node in members:
            _fill(model.graph, node, present)
            node.node.overload = overload
        function = function_of(kind, present, overload, opset)
        model.functions[function.identifier()] = function
    model.graph.opset_imports.pop(
        DOMAIN, None
    )  # the trace's, which a standard graph has no use for
    if nodes:
        model.graph.opset_imports[DOMAIN] = 1
    return mixed


def _fill(graph: Any, node: Node, present: tuple[str, ...]) -> None:
    """Give a node the inputs that others of its form have, with values that change nothing."""
    w = GraphWriter(graph)
    names = INPUTS[node.kind]
    arity = max(names.index(name) for name in present) + 1
    for name in present:
        if node.input(name) is None and name == "gain":
            node.set(name, w.constant(np.zeros(0, np.float32), "feinwerk.no_gain"))
        elif node.input(name) is None and name == "bias":
            import onnx_ir as ir

            rows = node.size("N") if "N" in node.node.attributes else node.input("weight").shape[0]
            zero = np.zeros(int(rows), ir.DataType(node.dtype).numpy())
            node.set(name, w.constant(zero, f"feinwerk.no_bias_{int(rows)}"))
    node.node.resize_inputs(arity)
