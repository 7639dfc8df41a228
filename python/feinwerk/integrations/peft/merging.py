"""Merging adapters into an NF4 base: dequantize, add, re-quantize, report; unmerging is exact."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from feinwerk import _checks
from feinwerk.integrations.peft import route
from feinwerk.integrations.peft.base import Base, read_nf4
from feinwerk.integrations.peft.norms import adapted_norm, row_norms_of
from feinwerk.nn import NF4Linear
from feinwerk.nn.merge import (
    KeptWeight,
    MergeReport,
    merged_weight,
    restore_weight,
    store,
    swap_weight,
)
from feinwerk.weight import NF4Weight

_LOG = logging.getLogger("feinwerk")


class NF4Merge:
    """One layer's merged state: the original tensors, and what re-quantizing has cost."""

    def __init__(self, kept: KeptWeight, report: MergeReport) -> None:
        """Keep both."""
        self.kept, self.report = kept, report


def merge(layer: Any, adapter_names: list[str] | None) -> None:
    """Merge adapters into an NF4Linear, all from its original codes; a failure changes nothing.

    The sum is made in fp32 and quantized once, however many adapters are merged, now or before.
    """
    names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.lora_A]
    if not names:
        return
    linear: NF4Linear = layer.get_base_layer()
    for name in names:
        reason = route.refusal(layer, name)
        if reason:
            what = f"adapter {name!r}"
            _checks.reject(ValueError, layer.label, what, "be LoRA or DoRA to be merged", reason)
    before: NF4Merge | None = layer.nf4_merge
    original = linear.nf4_weight if before is None else before.kept.weight
    bias = linear.bias if before is None else before.kept.bias
    assert isinstance(original, NF4Weight)
    base = read_nf4(linear)._replace(
        weight=original.packed, absmax=original.absmax, nested_absmax=original.nested_absmax,
        nested_codebook=original.nested_codebook, nested_offset=original.nested_offset,
    )  # fmt: skip
    exact: NF4Weight | torch.Tensor = original
    new_bias: torch.Tensor | None = None
    for name in [*layer.merged_adapters, *names]:
        exact, extra = _add(layer, name, base, exact)
        if extra is not None:
            if bias is None:
                rule = "have a bias to merge an adapter with lora_bias=True"
                _checks.reject(RuntimeError, layer.label, "the base layer", rule, "none")
            new_bias = (bias.detach().float() if new_bias is None else new_bias) + extra
    assert isinstance(exact, torch.Tensor)
    try:
        stored, report = store(exact, original)
    except ValueError as error:
        raise ValueError(f"{layer.label}: {error}") from error
    if before is not None:
        restore_weight(linear, before.kept)
    layer.nf4_merge = NF4Merge(swap_weight(linear, stored, new_bias), report)
    layer.merged_adapters.extend(names)
    _LOG.info("%s: merged %s into NF4, %s", layer.label, ", ".join(names), report)
    warnings.warn(
        "merging into NF4 re-quantizes the sum; each layer's `merge_report` and "
        "feinwerk.explain(model) give the error that this adds, and "
        "feinwerk.dequantize_model(model) before merging avoids it",
        stacklevel=3,
    )


def unmerge(layer: Any) -> None:
    """Put the original codes back, bit for bit."""
    restore_weight(layer.get_base_layer(), layer.nf4_merge.kept)
    layer.nf4_merge = None
    layer.merged_adapters.clear()


def _add(
    layer: Any, name: str, base: Base, weight: NF4Weight | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`weight` with one more adapter, and what the adapter adds to the bias."""
    part = route.adapter(layer, name, base)
    gain = None
    if part.magnitude is not None:
        norm = adapted_norm(base, part.A, part.B, part.scaling, row_norms_of(base))
        gain = torch.where(norm > 0, part.magnitude.detach().float() / norm, 0.0)
    total = merged_weight(weight, part.A, part.B, scaling=part.scaling, gain=gain)
    return total, None if part.bias is None else part.scaling * part.bias.detach().float()
