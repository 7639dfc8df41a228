"""Options of a LoraConfig that a quantized base cannot honour, refused before anything is made."""

from __future__ import annotations

from typing import Any

from torch import nn

from feinwerk import _checks
from feinwerk.integrations.peft import base as base_layer
from feinwerk.nn import NF4Linear

# KaSA rewrites the base weight; PEFT's layer over bitsandbytes passes over all three and would
# train plain LoRA.
_NOT_OVER = {
    "NF4Linear": ("kasa_config",),
    "Linear4bit": ("kasa_config", "monteclora_config", "use_bdlora"),
}

# These rewrite the base weight, or take its dtype for the adapter's.
_INITS = {
    "NF4Linear": (True, False, "gaussian", "eva"),
    "Linear4bit": (True, False, "gaussian", "eva", "olora"),
}


def refuse_config(label: str, base: nn.Module, config: Any) -> None:
    """Raise a ValueError that names the layer if an option has no meaning over its base."""
    if isinstance(base, NF4Linear):
        kind = "NF4Linear"
    elif base_layer.is_bitsandbytes(base):
        kind = "Linear4bit"
    else:
        return
    init = config.init_lora_weights
    if init == "lora_ga" and not hasattr(base, "_peft_loraga_grad"):
        init = True  # what PEFT makes of it without gradients, as when an adapter is loaded
    if not any(init is known or init == known for known in _INITS[kind]):
        known = ", ".join(map(repr, _INITS[kind]))
        rule = f"be one of {known} over {kind} (initialize before quantizing for the others)"
        _checks.reject(ValueError, label, "init_lora_weights", rule, repr(init))
    for option in _NOT_OVER[kind]:
        if getattr(config, option, None):
            value = getattr(config, option)
            _checks.reject(ValueError, label, option, f"not be set over {kind}", value)
