"""Layers of bitsandbytes in a model that Olive has loaded become NF4Linear: the same bytes."""

from __future__ import annotations

from torch import nn

from feinwerk.nn import NF4Linear


def take_over(model: nn.Module) -> list[str]:
    """Replace every Linear4bit of bitsandbytes by an NF4Linear that holds its codes and scales.

    Known by name, so that bitsandbytes is not imported for models without it.

    Args:
        model: any module, on CPU.

    Returns:
        The names of the replaced layers.

    Raises:
        RuntimeError: if a layer is FP4.

    Source:
        bitsandbytes 0.50.2, Linear4bit's state dict; docs/format.md.

    Example:
        >>> take_over(nn.Sequential(nn.Linear(2, 2)))
        []
    """
    names = []
    for name, module in list(model.named_modules()):
        kind = type(module)
        if kind.__name__ != "Linear4bit" or not kind.__module__.startswith("bitsandbytes."):
            continue
        assert isinstance(module, nn.Linear)
        layer = NF4Linear(module.in_features, module.out_features, bias=module.bias is not None)
        layer.load_state_dict(module.state_dict())
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
        names.append(name)
    return names
