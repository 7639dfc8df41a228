"""Feinwerk's nodes in a traced graph, and what they become: functions, contrib, standard nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.onnx import standard_forms
from feinwerk.onnx.adapter_inputs import GAIN, PARTS
from feinwerk.onnx.graph_writer import GraphWriter
from feinwerk.onnx.standard_forms import BFLOAT16, FLOAT, LowRank, NF4Values

DOMAIN = "feinwerk"
NESTED = ("nested_absmax", "nested_codebook", "nested_offset")
LOW_RANK = (*PARTS, GAIN)
# The inputs of every node, in order; docs/onnx_ops.md.
INPUTS = {
    "NF4Linear": ("x", "packed", "absmax", "bias", *NESTED),
    "NF4LoraLinear": ("x", "packed", "absmax", *LOW_RANK, "bias", *NESTED),
    "LoraLinear": ("x", "weight", *LOW_RANK, "bias"),
    "NF4Embedding": ("indices", "packed", "absmax", *NESTED),
    "LoraEmbedding": ("rows", "indices", *LOW_RANK),
}
ATTRIBUTES = {
    "NF4Linear": ("N", "K", "block_size"),
    "NF4LoraLinear": ("N", "K", "block_size"),
    "LoraLinear": (),
    "NF4Embedding": ("N", "K", "block_size", "to"),
}
# MatMulBnb4 takes these only; another one is a run-time error there.
CONTRIB_BLOCKS = (32, 64, 128, 256)


@dataclass
class Node:
    """One of Feinwerk's nodes, its inputs by name; `path` is its layer's, or empty."""

    node: Any
    path: str = ""

    @property
    def kind(self) -> str:
        """The operation."""
        return str(self.node.op_type)

    def input(self, name: str) -> Any:
        """The value of an input, or None."""
        names = INPUTS[self.kind]
        index = names.index(name) if name in names else len(self.node.inputs)
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def set(self, name: str, value: Any) -> None:
        """Put a value in an input's place."""
        index = INPUTS[self.kind].index(name)
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def size(self, name: str) -> int:
        """An int attribute."""
        return int(self.node.attributes[name].value)

    @property
    def dtype(self) -> int:
        """The element type of x or of the rows."""
        if self.kind == "NF4Embedding":
            return self.size("to")
        return int((self.input("x") or self.input("rows")).dtype)

    @property
    def nested(self) -> bool:
        """Whether absmax holds codes."""
        return self.input("nested_absmax") is not None

    def nf4(self) -> NF4Values:
        """Its NF4 weight, sizes known."""
        values = (self.input(name) for name in ("packed", "absmax", *NESTED))
        return NF4Values(*values, *(self.size(name) for name in ("N", "K", "block_size")))

    def low_rank(self) -> LowRank | None:
        """Its adapter."""
        if self.input("lora_A") is None:
            return None
        gain = self.input("gain")
        known = gain is None or (gain.const_value is not None and not gain.is_graph_input())
        if known and gain is not None and gain.const_value.size == 0:
            gain = None
        A, B, scaling = (self.input(name) for name in LOW_RANK[:3])
        return LowRank(A, B, scaling, gain, not known)


def write_standard(w: GraphWriter, node: Node) -> Any:
    """Write a node in standard operators; return the value that takes its output's place."""
    dtype, bias = node.dtype, node.input("bias")
    if node.kind == "LoraEmbedding":
        low_rank, rows = node.low_rank(), node.input("rows")
        assert low_rank is not None
        columns = int(rows.shape[-1])
        return standard_forms.lora_embedding(
            w, rows, node.input("indices"), low_rank, columns, dtype
        )
    x = node.input("x")
    if node.kind == "LoraLinear":
        weight = node.input("weight")
        N = int(weight.shape[0])
        return standard_forms.linear(w, x, weight, node.low_rank(), bias, N, dtype)
    if node.kind == "NF4Embedding":
        rows = standard_forms.nf4_embedding(w, node.input("indices"), node.nf4())
        to = node.size("to")
        return rows if to == FLOAT else w.op("Cast", rows, to=to)
    return standard_forms.nf4_linear(w, x, node.nf4(), node.low_rank(), bias, dtype)


def why_not_contrib(node: Node) -> str:
    """Why com.microsoft.MatMulBnb4 does not take a node's weight; empty if it does."""
    if node.kind not in ("NF4Linear", "NF4LoraLinear"):
        return "no contrib operator for it"
    if node.size("block_size") not in CONTRIB_BLOCKS:
        return f"MatMulBnb4 has no blocks of {node.size('block_size')}"
    if node.dtype == BFLOAT16:
        return "MatMulBnb4 has no bfloat16 on CPU"
    if len(node.input("x").shape) < 2:
        return "MatMulBnb4 takes no vector"
    values = [node.input(name) for name in ("packed", "absmax", *NESTED) if node.input(name)]
    if any(value.const_value is None for value in values):
        return "its weight is not a constant"
    return ""


def write_contrib(w: GraphWriter, node: Node) -> Any:
    """Write an NF4 product with MatMulBnb4 and standard operators for the adapter."""
    x, dtype = node.input("x"), node.dtype
    absmax = node.input("absmax")
    if node.nested or dtype != FLOAT:
        name = f"{absmax.name}.expanded"
        kind = np.float32 if dtype == FLOAT else np.float16
        absmax = w.constant(_expanded(node).astype(kind), name)
    y = w.op(
        "MatMulBnb4", x, w.reshaped_constant(node.input("packed")), absmax,
        domain="com.microsoft", version=1, N=node.size("N"), K=node.size("K"),
        block_size=node.size("block_size"), quant_type=1,
    )  # fmt: skip
    low_rank, bias = node.low_rank(), node.input("bias")
    if low_rank is None and bias is None:
        return y
    y, wide = (standard_forms.as_float(w, value, dtype) for value in (y, x))
    return standard_forms.finished(w, x, wide, y, low_rank, bias, node.size("N"), dtype)


def _expanded(node: Node) -> Any:
    absmax, *nested = (node.input(name) for name in ("absmax", *NESTED))
    codes = absmax.const_value.numpy().reshape(-1)
    if not node.nested:
        return codes
    scale, codebook, offset = (value.const_value.numpy().reshape(-1) for value in nested)
    groups = np.repeat(scale, NESTED_BLOCKSIZE)[: codes.size]
    return codebook[codes] * groups + offset


def function_of(kind: str, present: tuple[str, ...], overload: str, opset: int) -> Any:
    """Return the function that means an operation for nodes with these inputs.

    It serves every size and every dtype of x; a gain of shape [0] stands for none.

    Args:
        kind: the operation.
        present: the inputs that the nodes have, the last of which sets the function's arity.
        overload: "" or what tells it from another function of the operation.
        opset: the version of the standard operators.

    Returns:
        An onnx_ir function.
    """
    import onnx_ir as ir

    names = INPUTS[kind][: max(INPUTS[kind].index(name) for name in present) + 1]
    inputs = [ir.Value(name=name) for name in names]
    values = {value.name: value for value in inputs if value.name in present}
    w = GraphWriter()
    sizes = {name: w.attribute(name) for name in ATTRIBUTES[kind] if name != "to"}

    def nf4() -> NF4Values:
        nested = (values.get(name) for name in NESTED)
        return NF4Values(values["packed"], values["absmax"], *nested, *sizes.values())

    low_rank, bias = None, values.get("bias")
    if "lora_A" in values:
        A, B, scaling = (values[name] for name in LOW_RANK[:3])
        low_rank = LowRank(A, B, scaling, values.get("gain"), True)
    if kind == "NF4Embedding":
        rows = standard_forms.nf4_embedding(w, values["indices"], nf4())
        to = ir.RefAttr("to", "to", ir.AttributeType.INT)
        w.nodes.append(ir.Node("", "Cast", [rows], [to], num_outputs=1))
        y = w.nodes[-1].outputs[0]
    elif kind == "LoraLinear":
        N = w.op("Shape", values["weight"], start=0, end=1)
        y = standard_forms.linear(w, values["x"], values["weight"], low_rank, bias, N, None)
    else:
        y = standard_forms.nf4_linear(w, values["x"], nf4(), low_rank, bias, None)
    y.name = "y"
    graph = ir.Graph(inputs, [y], nodes=w.nodes, opset_imports={"": opset}, name=kind)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ATTRIBUTES[kind]]
    return ir.Function(DOMAIN, kind, overload, graph=graph, attributes=attributes)
