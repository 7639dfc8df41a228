"""GraphWriter: writes standard ONNX nodes, into a graph or into a function, in one vocabulary.

Sizes are known numbers in a graph and attributes in a function; `Size` covers both, so that what an
operation means is written once (standard_forms.py) for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from feinwerk.codebook import NF4_VALUES

# A size that is known, or the int64 [1] value that holds it.
Size = Any


def nf4_pairs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The two values of every byte of codes, the high nibble's first: fp32 [256, 2]."""
    values = np.array(NF4_VALUES, dtype=np.float32)
    byte = np.arange(256)
    return np.stack([values[byte >> 4], values[byte & 15]], axis=1)


class GraphWriter:
    """Collects nodes; constants become shared initializers of a graph, or nodes in a function."""

    def __init__(self, graph: Any = None) -> None:
        """Write for a graph, or with None for a function."""
        self.graph = graph
        self.nodes: list[Any] = []
        self._constants: dict[Any, Any] = {}

    def op(
        self,
        op_type: str,
        *inputs: Any,
        domain: str = "",
        version: int | None = None,
        **attributes: Any,
    ) -> Any:
        """Add a node; return its first output."""
        import onnx_ir as ir

        kept = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        node = ir.Node(domain, op_type, inputs, kept, num_outputs=1, version=version)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: Any, name: str = "") -> Any:
        """Return a value that holds the array; equal ones are one value."""
        import onnx_ir as ir

        array = np.asarray(array)
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key in self._constants:
            return self._constants[key]
        tensor = ir.tensor(array)
        if self.graph is None:
            value = self.op("Constant", value=tensor)
        else:
            value = _initializer(self.graph, name or _name_of(array), tensor)
        self._constants[key] = value
        return value

    def reshaped_constant(self, value: Any) -> Any:
        """Return an initializer's value flat: as it is, or the same bytes once more as a vector."""
        import onnx_ir as ir

        tensor = value.const_value
        if len(tensor.shape) == 1:
            return value
        flat = ir.tensor(tensor.numpy().reshape(-1))
        return _initializer(self.graph, f"{value.name}.flat", flat)

    def attribute(self, name: str) -> Any:
        """Return the function's int attribute as an int64 [1] value."""
        import onnx_ir as ir

        reference = ir.RefAttr("value_int", name, ir.AttributeType.INT)
        node = ir.Node("", "Constant", (), [reference], num_outputs=1)
        self.nodes.append(node)
        return self.op("Reshape", node.outputs[0], self.constant(np.array([1], np.int64)))

    def size(self, size: Size) -> Any:
        """Return a size as an int64 [1] value."""
        return self.constant(np.array([size], np.int64)) if isinstance(size, int) else size

    def sizes(self, sizes: Sequence[Size]) -> Any:
        """Return a shape as one int64 value."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(np.array(sizes, np.int64))
        return self.op("Concat", *(self.size(size) for size in sizes), axis=0)

    def reshape(self, value: Any, *sizes: Size) -> Any:
        """Return the value in another shape; -1 as in ONNX."""
        return self.op("Reshape", value, self.sizes(sizes))

    def product(self, left: Size, right: Size) -> Size:
        """Return left * right."""
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return self.op("Mul", self.size(left), self.size(right))

    def first(self, value: Any, count: Size) -> Any:
        """Return the first `count` elements along dimension 0."""
        zero = self.size(0)
        return self.op("Slice", value, zero, self.size(count), zero)


def _name_of(array: np.ndarray[Any, Any]) -> str:
    if array.size <= 4:
        numbers = "_".join(str(number) for number in array.reshape(-1).tolist())
        return f"feinwerk.{array.dtype.name}_{'x'.join(map(str, array.shape))}_{numbers}"
    return "feinwerk.constant"


def _initializer(graph: Any, name: str, tensor: Any) -> Any:
    """Add an initializer to the graph, under a name that is free, and return its value."""
    import onnx_ir as ir

    free, count = name, 0
    while free in graph.initializers:
        old = graph.initializers[free].const_value
        if (
            old is not None and old.dtype == tensor.dtype and old.shape == tensor.shape
            and old.tobytes() == tensor.tobytes()
        ):  # fmt: skip
            return graph.initializers[free]
        count += 1
        free = f"{name}_{count}"
    tensor.name = free
    value = ir.Value(
        name=free, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[free] = value
    return value
