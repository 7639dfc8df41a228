"""What `feinwerk.explain` says about a layer of PEFT."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora

from feinwerk.integrations.peft import base as base_layer
from feinwerk.integrations.peft import route
from feinwerk.integrations.peft.fuse import fused_class
from feinwerk.integrations.peft.layer import FusedLayer
from feinwerk.nn import NF4Linear, nf4_rows


def describe(layer: Any) -> tuple[str, str, str]:
    """Return (path, op, why): "fused", "peft" or "dense", the fused op's name, and the reason."""
    if not isinstance(layer, FusedLayer):
        kind: Any = type(layer)
        if not isinstance(layer, lora.LoraLayer):
            return "peft", "", f"{kind.__name__} is not LoRA"
        if fused_class(kind) is None:
            return "peft", "", f"lora.{kind.__name__} has no fused form"
        return "peft", "", "not fused yet: feinwerk.integrations.peft.fuse(model)"
    way = route.find(layer, sharded=nf4_rows.is_managed(layer))
    if way.op == "":
        return "peft", "", way.why
    if way.op != "base":
        if layer.fused_refusal:
            return "peft", "", layer.fused_refusal
        return "fused", way.op, way.why
    base = layer.base_layer
    nf4 = isinstance(base, NF4Linear) or (
        base_layer.is_bitsandbytes(base) and not isinstance(base_layer.read(base), str)
    )
    why = way.why
    report = getattr(layer, "merge_report", None)
    if report is not None:
        why += f"; re-quantizing added {report}"
    return ("fused", "nf4_linear", why) if nf4 else ("dense", "", why)
