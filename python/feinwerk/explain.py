"""explain: which way every layer of a model takes, and why; nothing falls back silently."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from feinwerk import backends
from feinwerk.nn import DoRALinear, LoRALinear, NF4Embedding, NF4Linear, nf4_rows
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.nf4_module import NF4Module

# The registered op behind each public function, where they differ.
_REGISTERED = {"dora_linear": "lora_linear", "grouped_lora_linear": "lora_linear"}


@dataclass(frozen=True)
class LayerPath:
    """One layer: where it is, what it is, and the way its next forward takes.

    `path` is "fused" (one of Feinwerk's ops), "peft" (PEFT's own forward) or "dense" (the layer's
    own code, torch's or another library's). `op` names the op of a fused layer, and `backend` what
    serves it on the layer's device; both are empty otherwise.
    """

    name: str
    layer: str
    path: str
    op: str
    backend: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: one row a layer, and a table of them when printed."""

    rows: tuple[LayerPath, ...]

    def __str__(self) -> str:
        """Counts, then a line for all layers that differ in nothing but the numbers in a name."""
        counts = Counter(row.path for row in self.rows)
        parts = [f"{counts[path]} {path}" for path in ("fused", "peft", "dense") if counts[path]]
        lines = [f"{len(self.rows)} layers: {', '.join(parts) or 'none'}"]
        groups = Counter(
            (re.sub(r"\b\d+\b", "*", row.name), row.layer, row.path, row.op, row.backend, row.why)
            for row in self.rows
        )
        table = [("path", "op", "backend", "count", "layer", "name", "why")]
        for (name, layer, path, op, backend, why), count in groups.items():
            table.append((path, op or "-", backend or "-", str(count), layer, name or "-", why))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Say for every layer with a weight matrix which way its next forward takes, and why.

    Reads the model's state (training mode, active and merged adapters, where weights live); runs
    nothing. A fused PEFT layer whose last call was left to PEFT because of its input says so. After
    `feinwerk.distributed.shard_nf4` the reason tells how each NF4 weight is sharded, or why not.

    Args:
        model: any module; PEFT is not needed for one without its layers.

    Returns:
        The rows, in model order; print it for a table.

    Raises:
        TypeError: if `model` is not a module.

    Source:
        docs/guides/peft.md.

    Example:
        >>> print(explain(nn.Sequential(nn.Linear(4, 4))))
        1 layers: 1 dense
        path   op  backend  count  layer   name  why
        dense  -   -        1      Linear  *     torch.nn.Linear
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"explain: model must be a torch.nn.Module, got {kind}")
    return Explanation(tuple(_rows(model, "")))


def _rows(module: nn.Module, name: str) -> Iterator[LayerPath]:
    found = _found(module)
    if found is not None:
        path, op, why = found
        backend = ""
        if op:
            device = _device(module)
            backend = backends.serving(_REGISTERED.get(op, op), device)[0]
        sharding = _sharding(module)
        if sharding:
            why = f"{why}; {sharding}"
        yield LayerPath(name, _class_name(module), path, op, backend, why)
        return
    for child_name, child in module.named_children():
        yield from _rows(child, f"{name}.{child_name}".lstrip("."))


def _found(module: nn.Module) -> tuple[str, str, str] | None:
    """(path, op, why) of a layer; None for what only contains layers."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
        from feinwerk.integrations.peft.describe import describe

        return describe(module)
    if isinstance(module, Adapter):
        return _adapter(module)
    if isinstance(module, NF4Linear):
        return "fused", "nf4_linear", "the weight is in NF4"
    if isinstance(module, NF4Embedding):
        return "fused", "nf4_embedding", "the table is in NF4"
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return None
    return "dense", "", f"{_origin(module)}.{type(module).__name__}"


def _adapter(module: Adapter) -> tuple[str, str, str]:
    if module.merged or not module.enabled:
        path, op, _ = _found(module.base_layer) or ("dense", "", "")
        return path, op, "merged" if module.merged else "the adapter is switched off"
    if isinstance(module, LoRALinear):
        op = "dora_linear" if isinstance(module, DoRALinear) else "lora_linear"
        return "fused", op, f"one adapter of rank {module.lora_A.shape[0]}"
    return "dense", "", "an adapter in torch's own operations"


def _sharding(module: nn.Module) -> str:
    """How the layer's NF4 weight is sharded; empty where nobody asked for that."""
    base: object = module
    while base is not None and not isinstance(base, NF4Module):
        base = getattr(base, "base_layer", None)
    return nf4_rows.note(base) if isinstance(base, NF4Module) else ""


def _origin(module: nn.Module) -> str:
    """The package of a module's class as people write it: torch.nn rather than its files."""
    package = type(module).__module__
    return "torch.nn" if package.startswith("torch.nn.") else package.partition(".")[0]


def _class_name(module: nn.Module) -> str:
    """What the module calls itself in a printed model, with PEFT's `lora.` before it."""
    return repr(module).partition("(")[0]


def _device(module: nn.Module) -> str:
    tensor = next(iter(module.parameters()), torch.empty(0))
    return tensor.device.type
