"""ExportReport: what an export wrote, what each layer became, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NodeReport:
    """One layer: its path, the operation, what that became, and why if it is not the first choice.

    `became` is an operator's name or "standard operators"; `was` are the classes of the layer.
    """

    path: str
    operation: str
    became: str
    why: str = ""
    was: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What `feinwerk.onnx.export` wrote; `str(report)` is a table.

    Args:
        path: the .onnx file.
        ops: "feinwerk", "contrib" or "portable".
        layers: what became of every layer that is no plain torch code.
        adapter_inputs: the names of the graph's adapter inputs, in order.
        inputs: the names of the other inputs.
        outputs: the names of the outputs.
        files: bytes of every file written.
        opset: the version of the standard operators.
        ir_version: of the file.
        notes: what a reader should know.
    """

    path: str
    ops: str
    layers: tuple[NodeReport, ...]
    adapter_inputs: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: dict[str, int]
    opset: int
    ir_version: int
    notes: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def __str__(self) -> str:
        """A table of the layers, one line for every kind, then files and notes."""
        kinds: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            key = (layer.was or layer.operation, layer.became, layer.adapter, layer.why)
            kinds.setdefault(key, []).append(layer.path)
        head = ("layers", "was", "became", "adapter", "why")
        rows = [head, *((_paths(paths), *key) for key, paths in kinds.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.files.items())
        lines += ["", f"{self.ops}, opset {self.opset}: {sizes}"]
        if self.adapter_inputs:
            lines.append(f"{len(self.adapter_inputs)} adapter inputs with defaults")
        return "\n".join([*lines, *self.notes])


def _paths(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)}: {paths[0]} ... {paths[-1]}"
