"""Where the tensors of a checkpoint go: the model's own, the optimizer's, or new states.

A state that the optimizer does not have yet is allocated as its first step would, without a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feinwerk.distributed.checkpoint import values
from feinwerk.distributed.checkpoint.manifest import Manifest, StoredTensor
from feinwerk.distributed.checkpoint.names import (
    model_tensors,
    optimizer_parameters,
    state_items,
)
from feinwerk.distributed.errors import MismatchedCheckpoint
from feinwerk.optim import AdamW
from feinwerk.optim.group import LAYOUT_OPTIONS
from feinwerk.optim.state import is_dtensor, to_local, wrap_state

State = dict[str, torch.Tensor]


@dataclass
class Targets:
    """What a checkpoint is read into.

    Attributes:
        tensors: by key of the checkpoint.
        made: the entries of the state dict that `load_state_dict` has to take over.
        new_states: (parameter, state) where the optimizer does not have one yet.
        stateless: the parameters that have no state in the checkpoint.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    new_states: list[tuple[torch.Tensor, State]] = field(default_factory=list)
    stateless: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Differences:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def names(self, stored: set[str], needed: set[str]) -> list[str]:
        """Note which names only one side has; return those of both."""
        self.missing += sorted(needed - stored)
        self.unexpected += sorted(stored - needed)
        return sorted(stored & needed)

    def tensor(self, key: str, stored: StoredTensor, own: torch.Tensor) -> None:
        """Note another dtype or shape: nothing is cast or cut."""
        ours = f"{values.dtype_name(own.dtype)} {list(own.shape)}"
        theirs = f"{stored.dtype} {list(stored.shape)}"
        if ours != theirs:
            self.different.append(f"{key} is {theirs} in the checkpoint and {ours} here")


def find_targets(
    op: str,
    path: Path,
    manifest: Manifest,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> Targets:
    """Match a checkpoint with a model and an optimizer; neither is changed.

    Raises:
        MismatchedCheckpoint: with every difference.
    """
    targets, differences = Targets(), _Differences()
    _match_model(op, manifest, model, targets, differences)
    if optimizer is not None:
        _match_optimizer(op, manifest, model, optimizer, targets, differences)
    if differences.missing or differences.unexpected or differences.different:
        raise MismatchedCheckpoint(
            str(path), differences.missing, differences.unexpected, differences.different
        )
    return targets


def _match_model(
    op: str, manifest: Manifest, model: nn.Module, targets: Targets, differences: _Differences
) -> None:
    found = model_tensors(op, model, manifest.parameters)
    stored = {key for key in manifest.tensors if key.startswith("model.")}
    for key in differences.names(stored, {f"model.{name}" for name in found.all()}):
        name, tensor = key.removeprefix("model."), manifest.tensors[key]
        if name in found.own:
            differences.tensor(key, tensor, found.own[name])
            targets.tensors[key] = found.own[name]
        else:
            # Its shape may depend on its content (JSON text); load_state_dict will check it.
            made = torch.empty(tensor.shape, dtype=values.DTYPES[tensor.dtype])
            targets.tensors[key] = targets.made[found.keys[name]] = made


def _match_optimizer(
    op: str,
    manifest: Manifest,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    targets: Targets,
    differences: _Differences,
) -> None:
    groups = optimizer_parameters(op, model, optimizer)
    stored: dict[str, set[str]] = {}
    for key in manifest.tensors:
        if key.startswith("optimizer."):
            owner, _, state_name = key.removeprefix("optimizer.").rpartition(".")
            stored.setdefault(owner, set()).add(state_name)
    if len(groups) != len(manifest.groups):
        differences.different.append(
            f"the optimizer has {len(manifest.groups)} parameter groups in the checkpoint and "
            f"{len(groups)} here"
        )
        return
    for index, (members, theirs) in enumerate(zip(groups, manifest.groups, strict=True)):
        here = [name for name, _ in members]
        group = optimizer.param_groups[index]
        if set(here) != set(theirs.parameters):
            title = "{} of parameter group " + str(index)
            differences.names({title.format(name) for name in theirs.parameters},
                              {title.format(name) for name in here})  # fmt: skip
            continue
        if here != list(theirs.parameters):
            differences.different.append(f"the order of the parameters in group {index}")
        before = len(differences.different)
        for option in LAYOUT_OPTIONS:
            ours, saved = group.get(option), values.decode(theirs.options.get(option))
            if ours != saved:
                differences.different.append(
                    f"{option} of group {index} is {saved!r} in the checkpoint and {ours!r} here"
                )
        if len(differences.different) > before:
            continue  # states of another format would differ in every tensor
        for name, parameter in members:
            if name not in stored:
                targets.stateless.append(parameter)
                continue
            prefix = f"optimizer.{name}."
            tensors = {key: manifest.tensors[prefix + key] for key in stored[name]}
            state = dict(state_items(op, name, optimizer.state.get(parameter, {})))
            if not state:
                state = _new_state(optimizer, parameter, group, tensors)
                targets.new_states.append((parameter, state))
            for key in differences.names(
                {prefix + key for key in tensors}, {prefix + key for key in state}
            ):
                own_state = state[key.removeprefix(prefix)]
                differences.tensor(key, manifest.tensors[key], own_state)
                targets.tensors[key] = own_state


def _new_state(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    group: dict[str, Any],
    stored: dict[str, StoredTensor],
) -> State:
    if isinstance(optimizer, AdamW):
        return optimizer.empty_state(parameter, group)
    # Of another optimizer: a state is like its parameter, or a number.
    local, shape = to_local(parameter), parameter.shape
    state = {}
    for name, tensor in stored.items():
        dtype = values.DTYPES[tensor.dtype]
        number = tensor.shape == ()
        state[name] = (
            torch.zeros((), dtype=dtype)
            if number
            else torch.zeros(local.shape, dtype=dtype, device=local.device)
        )
    if is_dtensor(parameter):
        dtensor: Any = parameter
        state = wrap_state(state, dtensor.device_mesh, dtensor.placements, shape)
    return state
