"""Checks and copies a state dict for AdamW: dtypes are kept, shapes and layout must fit.

`torch.optim.Optimizer.load_state_dict` casts every tensor to the parameter's dtype, which turns
codes into fp32 and absmax into bf16. Here a tensor is loaded as it is, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from feinwerk import _checks
from feinwerk.optim.group import LAYOUT_OPTIONS
from feinwerk.optim.state import Group, State, global_shape_of_state, is_dtensor, state_dtypes


def check_layout(op: str, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Reject saved groups whose states have another layout than this optimizer's.

    Args:
        op: the optimizer's name, for messages.
        groups: its parameter groups.
        saved: those of the state dict; options that it lacks are not compared.

    Raises:
        ValueError: naming the first option that differs.
    """
    for i, (group, other) in enumerate(zip(groups, saved, strict=False)):
        for name in LAYOUT_OPTIONS:
            if name in other and other[name] != group[name]:
                where = f"{name} of group {i} in state_dict"
                rule = f"be {group[name]!r} as in this optimizer"
                _checks.reject(ValueError, op, where, rule, repr(other[name]))


def loaded_state(
    op: str, name: str, param: torch.Tensor, saved: Mapping[str, Any], group: Group
) -> State:
    """Return a copy of one parameter's saved state, on its device and placed as it is placed.

    Args:
        op: the optimizer's name, for messages.
        name: the parameter's name, for messages.
        param: the parameter.
        saved: its entry in the state dict; full tensors are cut if the parameter is a DTensor.
        group: its parameter group.

    Raises:
        TypeError: if a tensor has another dtype, or is a DTensor and the parameter is none.
        ValueError: if a tensor is missing, not expected, or has another shape.
    """
    dtypes = state_dtypes(param.shape, param.dtype, group)
    if set(saved) != set(dtypes):
        rule = f"have {', '.join(dtypes)}"
        _checks.reject(
            ValueError, op, f"state of {name}", rule, ", ".join(map(str, saved)) or "none"
        )
    state: State = {}
    for key, dtype in dtypes.items():
        value = saved[key]
        if key == "step":
            state[key] = torch.as_tensor(value, dtype=dtype, device="cpu").detach().clone()
            continue
        where = f"{key} of {name}"
        _checks.tensor(op, where, value)
        if value.dtype is not dtype:
            _checks.reject(TypeError, op, where, f"be {dtype}", value.dtype)
        shape = global_shape_of_state(key, param.shape, group)
        if tuple(value.shape) != shape:
            _checks.reject(ValueError, op, where, f"have shape {shape}", tuple(value.shape))
        state[key] = _placed(op, where, param, value.detach())
    return {key: state[key] for key in saved}


def _placed(op: str, where: str, param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Copy: the caller may go on to use what it has loaded, and steps are in place."""
    if not is_dtensor(param):
        if is_dtensor(value):
            rule = "be a plain tensor as the parameter is"
            _checks.reject(TypeError, op, where, rule, "a DTensor")
        return value.to(param.device, copy=True).contiguous()
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = cast(DTensor, param).device_mesh, cast(DTensor, param).placements
    if not isinstance(value, DTensor):
        # Every rank has the whole: nothing is sent.
        cut = distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)
        value = cut
    elif value.device_mesh != mesh or value.placements != placements:
        rule = f"be placed as the parameter is, {placements} over {mesh}"
        _checks.reject(ValueError, op, where, rule, f"{value.placements} over {value.device_mesh}")
    local = value.to_local().to(param.device, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )
