"""The names of tensors in a checkpoint: the same whatever wraps the model and shards it.

```
   model.<name>                 <name> as in the bare model's state_dict()
   optimizer.<name>.<state>     one for each tensor in optimizer.state of the parameter <name>
```
Wrappers put a component into names (`module.`, `_orig_mod.`, ...); it is left out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.optim import AdamW

Parameters = Literal["trainable", "all"]

# Components that torch's own wrappers add, and nobody else uses: torch.compile, activation
# checkpointing, FSDP1.
_WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Wrappers that call what they wrap `module`, a name that models use as well. DeepSpeed's engine is
# told by its name: importing DeepSpeed to ask would take seconds.
_MODULE_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def canonical(model: nn.Module, name: str) -> str:
    """Return a name from `model.state_dict()` or `named_parameters()` without its wrappers.

    Example:
        >>> canonical(nn.DataParallel(nn.Linear(2, 2)), "module.weight")
        'weight'
    """
    kept: list[str] = []
    module: Any = model
    for part in name.split("."):
        wraps = part in _WRAPPER_NAMES or (
            part == "module"
            and any(base.__name__ in _MODULE_WRAPPERS for base in type(module).__mro__)
        )
        if not wraps:
            kept.append(part)
        modules = getattr(module, "_modules", {})  # a key may go on past the modules
        module = modules.get(part)
    return ".".join(kept)


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model by their names in a checkpoint, and how they are put back.

    Attributes:
        own: parameters and buffers of the model itself: loaded in place.
        made: what `state_dict()` made for saving, such as the constants of an NF4 weight: loaded
            through `load_state_dict`.
        keys: for every name the key in this model's own state dict.
    """

    own: dict[str, torch.Tensor]
    made: dict[str, torch.Tensor]
    keys: dict[str, str]

    def all(self) -> dict[str, torch.Tensor]:
        """Return both kinds."""
        return {**self.own, **self.made}


def model_tensors(op: str, model: nn.Module, parameters: str) -> ModelTensors:
    """Return what a checkpoint holds of a model.

    Args:
        op: the public function, for messages.
        model: any module.
        parameters: "trainable" for the parameters that require gradients and the persistent
            buffers, "all" for the whole state dict.

    Raises:
        TypeError: if the state dict holds something else than tensors.
        ValueError: if parameters is neither.
    """
    if parameters not in ("trainable", "all"):
        rule = 'be "trainable" or "all"'
        _checks.reject(ValueError, op, "parameters", rule, repr(parameters))
    # First of all: under FSDP2 it brings the sharded parameters back into their places.
    state_dict = model.state_dict(keep_vars=True)
    owned: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    owned |= dict(model.named_buffers(remove_duplicate=False))
    found = ModelTensors({}, {}, {})
    seen: set[int] = set()
    for key, value in state_dict.items():
        own = owned.get(key) is value
        trained = isinstance(value, nn.Parameter) and value.requires_grad
        buffer = own and not isinstance(value, nn.Parameter)
        if parameters == "trainable" and not (trained or buffer):
            continue
        name = canonical(model, key)
        if not isinstance(value, torch.Tensor):
            rule = 'hold tensors only (parameters="trainable" leaves it out)'
            _checks.reject(TypeError, op, f"state_dict()[{key!r}]", rule, type(value).__name__)
        if id(value) in seen:
            continue  # a tied parameter is stored once, under its first name
        seen.add(id(value))
        found.keys[name] = key
        (found.own if own else found.made)[name] = value.detach()
    return found


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the name of every parameter by its id; a tied one has its first name."""
    return {id(p): canonical(model, name) for name, p in model.named_parameters()}


def optimizer_parameters(
    op: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[list[tuple[str, torch.Tensor]]]:
    """Return (name, parameter) of every parameter group, in the optimizer's order.

    Raises:
        ValueError: if the optimizer has a parameter that is not one of the model's.
    """
    names = parameter_names(model)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        members = []
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                _checks.reject(
                    ValueError, op, f"optimizer.param_groups[{index}]['params'][{position}]",
                    "be a parameter of the model", f"another tensor of shape {parameter.shape}",
                )  # fmt: skip
            members.append((names[id(parameter)], parameter))
        groups.append(members)
    return groups


def state_items(op: str, name: str, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (state name, tensor) of one parameter's state.

    Raises:
        TypeError: if an entry is not a tensor.
        ValueError: if its name could be taken for part of the parameter's.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            place = f"optimizer.state of {name}[{key!r}]"
            _checks.reject(TypeError, op, place, "be a torch.Tensor", type(value).__name__)
        if not isinstance(key, str) or "." in key:
            place = f"the names in optimizer.state of {name}"
            _checks.reject(ValueError, op, place, "be text without dots", repr(key))
        yield key, value.detach()


def release_of(optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    """Return what gives back the memory of states that are in files as well."""
    return optimizer.release_memory if isinstance(optimizer, AdamW) else lambda: None
