"""The adapter inputs of an exported graph: which layers have them, in which shapes.

An adapter input is a graph input with a default of the same name: `<path>.lora_A`, `.lora_B`,
`.scaling` and, in a graph with room for DoRA, `.gain`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feinwerk import _checks

PARTS = ("lora_A", "lora_B", "scaling")
GAIN = "gain"

# A size; a name or None for a size that the graph leaves open.
Shape = tuple[Any, ...]


def adapter_runtime(op: str) -> Any:
    """Return onnxruntime, whose releases before 1.20 know no adapters."""
    import onnxruntime

    if not hasattr(onnxruntime, "LoraAdapter"):
        rule = "be 1.20 or newer for adapter files"
        _checks.reject(ImportError, op, "onnxruntime", rule, onnxruntime.__version__)
    return onnxruntime


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The layers that have all the inputs of an adapter, in order."""
    known = set(names)
    paths = (name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A"))
    return tuple(path for path in paths if all(f"{path}.{part}" in known for part in PARTS))


def part_names(layers: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The adapter inputs among `names`: three or four of each layer."""
    known = set(names)
    inputs = (f"{layer}.{part}" for layer in layers for part in (*PARTS, GAIN))
    return tuple(name for name in inputs if name in known)


def shape_fits(shape: tuple[int, ...], declared: Shape) -> bool:
    """Whether a shape is one that the graph has declared."""
    return len(shape) == len(declared) and all(
        want == got for want, got in zip(declared, shape, strict=True) if isinstance(want, int)
    )


def text_of(shape: Iterable[Any]) -> str:
    """A shape as the messages show it."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


@dataclass(frozen=True)
class AdapterInputs:
    """What a graph says of its adapter inputs; `model` is its protobuf, external data not read."""

    path: Path
    model: Any
    shapes: dict[str, Shape]
    layers: tuple[str, ...]

    def check_shape(self, op: str, name: str, shape: tuple[int, ...]) -> None:
        """Reject a shape that the graph's input cannot have."""
        declared = self.shapes[name]
        if not shape_fits(shape, declared):
            rule = f"have shape {text_of(declared)} as in {self.path.name}"
            _checks.reject(ValueError, op, name, rule, text_of(shape))

    def sizes(self, op: str, layer: str) -> tuple[int, int]:
        """N and K of a layer, as its adapter inputs say."""
        N, K = self.shapes[f"{layer}.lora_B"][0], self.shapes[f"{layer}.lora_A"][1]
        if not isinstance(N, int) or not isinstance(K, int):
            rule = "have known sizes N and K in the graph"
            _checks.reject(ValueError, op, layer, rule, f"N={N}, K={K}")
        return N, K


def read_inputs(op: str, path: str | Path) -> AdapterInputs:
    """Read the adapter inputs of an .onnx file; the weights stay on the disk.

    Args:
        op: who asks, for messages.
        path: the file.

    Returns:
        Names, shapes and layers, in the graph's order.

    Raises:
        ImportError: if onnx is not installed.
        ValueError: if the graph has no adapter inputs.
    """
    import onnx

    path = Path(path)
    model = onnx.load(path, load_external_data=False)
    defaults = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, Shape] = {}
    for value in model.graph.input:
        if value.name in defaults:
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in dims
            )
    layers = layers_of(shapes)
    if not layers:
        rule = "have adapter inputs <path>.lora_A, .lora_B and .scaling with defaults"
        _checks.reject(ValueError, op, path.name, rule, f"{len(shapes)} inputs with defaults")
    named = part_names(layers, shapes)
    return AdapterInputs(path, model, {name: shapes[name] for name in named}, layers)
