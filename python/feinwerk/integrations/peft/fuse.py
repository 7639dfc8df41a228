"""fuse, unfuse, fused_config and invalidate: putting a PEFT model on the fused ops and back."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from feinwerk import _checks
from feinwerk.integrations.peft import base as base_layer
from feinwerk.integrations.peft import route
from feinwerk.integrations.peft.config import refuse_config
from feinwerk.integrations.peft.layer import FusedLayer, FusedLinear
from feinwerk.nn import NF4Linear


def fuse(model: nn.Module) -> list[str]:
    """Put the LoRA layers of a PEFT model on the fused ops, in place.

    Every `lora.Linear` (and `lora.Linear4bit`, over bitsandbytes' layers) becomes a subclass of
    itself. Parameters, their names, adapter files and the model's own class stay as they are, and
    so does everything that PEFT does with such a layer. What the fused ops do not cover runs
    PEFT's own forward, layer by layer: `feinwerk.explain(model)` says which and why. Calling it
    again is harmless, and takes in layers that were added meanwhile.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.

    Returns:
        The names of the layers that were changed by this call.

    Raises:
        ValueError: if an adapter does not fit its base layer or its scaling is not finite; the
            message names the layer, and no layer has been changed.

    Source:
        docs/guides/peft.md.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> fuse(model)
        ['base_model.model.0']
    """
    found = []
    for name, module in model.named_modules():
        kind = fused_class(type(module))
        if kind is not None:
            _check_adapters(module, name)
            found.append((name, module, kind))
    for name, module, kind in found:
        module.__class__ = kind
        module.fused_name = name
    return [name for name, _, _ in found]


def unfuse(model: nn.Module) -> list[str]:
    """Give every fused layer its PEFT class back, in place.

    Args:
        model: what `fuse` was called with, or any module around it.

    Returns:
        The names of the layers that were changed.

    Raises:
        ValueError: if an adapter is merged into an NF4Linear, which PEFT's own code cannot
            unmerge; no layer has been changed.

    Source:
        docs/guides/peft.md.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> _ = fuse(model)
        >>> unfuse(model)
        ['base_model.model.0']
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, FusedLayer)]
    for name, module in found:
        if module.merged and isinstance(module.get_base_layer(), NF4Linear):
            rule = "be unmerged before unfuse: call unmerge_adapter() first"
            _checks.reject(ValueError, "unfuse", name, rule, module.merged_adapters)
    for _, module in found:
        stock = next(c for c in type(module).__mro__ if c.__module__.startswith("peft."))
        for key in ("fused_name", "fused_refusal", "_norms", "nf4_merge"):
            vars(module).pop(key, None)
        module.__class__ = stock
    return [name for name, _ in found]


def fused_config(config: LoraConfig) -> LoraConfig:
    """Make PEFT create fused layers for this config, and return it.

    The registration is not saved with an adapter: pass the config again when one is loaded, or
    call `fuse` on the loaded model.

    Args:
        config: for get_peft_model, add_adapter or PeftModel.from_pretrained(config=...).

    Returns:
        The same config.

    Raises:
        TypeError: if it is not a LoraConfig.

    Source:
        PEFT's developer guide on custom models; docs/guides/peft.md.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = fused_config(LoraConfig(target_modules=["0"]))
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        >>> isinstance(model.base_model.model[0], FusedLinear)
        True
    """
    if not isinstance(config, LoraConfig):
        rule = "be a peft.LoraConfig"
        _checks.reject(TypeError, "fused_config", "config", rule, type(config).__name__)
    # PEFT calls the value like a class, and goes on to its own when it returns None.
    config._register_custom_module({nn.Module: _dispatch})  # type: ignore[dict-item]
    return config


def invalidate(model: nn.Module) -> None:
    """Make every fused layer compute its norms afresh.

    Needed only after a base weight was overwritten through `.data`, which no one can notice.

    Args:
        model: any module with fused layers inside.

    Source:
        docs/guides/peft.md.

    Example:
        >>> invalidate(nn.Linear(2, 2))
    """
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.forget_norms()


def fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fused subclass of one of PEFT's classes, if it has one."""
    if kind is lora.Linear:
        return FusedLinear
    if kind.__module__ == "peft.tuners.lora.bnb" and kind.__name__ == "Linear4bit":
        from feinwerk.integrations.peft.linear4bit import FusedLinear4bit

        return FusedLinear4bit
    return None


def _check_adapters(module: Any, name: str) -> None:
    base = base_layer.read(module.get_base_layer())
    if isinstance(base, str):
        return
    for adapter_name in module.lora_A:
        if not route.refusal(module, adapter_name):
            route.adapter(module, adapter_name, base, name)


def _dispatch(target: nn.Module, adapter_name: str, *, config: Any, **kwargs: Any) -> Any:
    """Create the fused layer for a target, or return None to leave it to PEFT's dispatchers."""
    if kwargs.pop("parameter_name", None) is not None:
        return None  # target_parameters wraps a parameter, not the layer
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    label = kwargs.get("target_name", "")
    if base_layer.is_bitsandbytes(base) and kwargs.get("loaded_in_4bit", False):
        from feinwerk.integrations.peft.linear4bit import FusedLinear4bit

        refuse_config(label, base, config)  # PEFT's constructor does not pass the name on
        layer: FusedLayer = FusedLinear4bit(target, adapter_name, config=config, **kwargs)
    elif type(base) in (nn.Linear, NF4Linear):
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is True but the base layer is a Linear; it is set to False",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        layer = FusedLinear(target, adapter_name, config=config, **kwargs)
    else:
        return None
    layer.fused_name = label
    return layer
