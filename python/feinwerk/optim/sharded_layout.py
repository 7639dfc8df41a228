"""ShardedLayout: trainable parameters of an optimizer, their buckets, what ranks must agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from feinwerk import _checks
from feinwerk.optim.agreement import Facts
from feinwerk.optim.buckets import Bucket, make_buckets
from feinwerk.optim.group import DTYPE_RULE, PARAM_DTYPES, parameter_name
from feinwerk.optim.state import is_dtensor

Groups = list[dict[str, Any]]
Signature = tuple[tuple[int, bool], ...]


def signature(groups: Groups) -> Signature:
    """What a layout depends on: which parameters there are, and which of them are trained."""
    return tuple((id(param), param.requires_grad) for group in groups for param in group["params"])


@dataclass(frozen=True)
class ShardedLayout:
    """Attributes are lists over the trainable parameters, as the slots of the buckets count them.

    Attributes:
        params: the parameters, each once.
        indices: of each, over all parameters of all groups.
        groups: index of each one's group.
        names: as messages have them.
        position: of a parameter's id in these lists.
        buckets: of kinds (parameter dtype, gradient dtype, device).
        signature: of the groups.
    """

    params: list[torch.Tensor]
    indices: list[int]
    groups: list[int]
    names: list[str]
    position: Mapping[int, int]
    buckets: list[Bucket]
    signature: Signature


def make_layout(op: str, groups: Groups, world_size: int, capacity: int) -> ShardedLayout:
    """Return the layout of an optimizer's groups.

    Args:
        op: the optimizer's name, for messages.
        groups: its parameter groups.
        world_size: number of ranks.
        capacity: bytes a bucket.

    Raises:
        TypeError: if a trainable parameter is a DTensor, or neither fp32 nor bf16.
        ValueError: if two parameters share their memory.
    """
    params: list[torch.Tensor] = []
    indices: list[int] = []
    group_of: list[int] = []
    position: dict[int, int] = {}
    places: dict[tuple[int, int], str] = {}
    index = -1
    for group_index, group in enumerate(groups):
        for param in group["params"]:
            index += 1
            if not param.requires_grad or id(param) in position:
                continue
            name = parameter_name(groups, index)
            _check(op, name, param, places)
            position[id(param)] = len(params)
            params.append(param)
            indices.append(index)
            group_of.append(group_index)
    names = [parameter_name(groups, index) for index in indices]
    # grad_dtype: torch can keep gradients in another dtype than the parameter's.
    kinds = [
        (param.dtype, getattr(param, "grad_dtype", None) or param.dtype, param.device)
        for param in params
    ]
    sizes = [param.element_size() for param in params]
    shapes = [tuple(param.shape) for param in params]
    buckets = make_buckets(shapes, kinds, sizes, world_size, capacity)
    return ShardedLayout(params, indices, group_of, names, position, buckets, signature(groups))


def _check(op: str, name: str, param: torch.Tensor, places: dict[tuple[int, int], str]) -> None:
    if is_dtensor(param):
        rule = "be a plain tensor (feinwerk.optim.AdamW steps DTensors, as fully_shard makes them)"
        _checks.reject(TypeError, op, name, rule, "a DTensor")
    if param.dtype not in PARAM_DTYPES:
        _checks.reject(TypeError, op, name, DTYPE_RULE, param.dtype)
    if param.numel():
        # Two parameters in one place would be stepped twice, and gathered over each other.
        place = param.untyped_storage()._cdata, int(param.storage_offset())
        if place in places:
            rule = f"not share its memory with {places[place]} (tie them as one Parameter)"
            _checks.reject(ValueError, op, name, rule, "one tensor under two Parameters")
        places[place] = name


def hyper_parameters(groups: Groups, options: Sequence[str]) -> list[list[tuple[str, Any]]]:
    """The options of every group as plain values, in one order."""
    return [[(name, _plain(group[name])) for name in options] for group in groups]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def layout_facts(layout: ShardedLayout, groups: Groups) -> Facts:
    """What the parameters of all ranks must have in common, in the order of looking."""
    facts = [("number of parameters", str(len(layout.signature)))]
    facts.append(("number of groups", str(len(groups))))
    index = -1
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            index += 1
            if names:
                facts.append((f"name of parameter {index}", repr(names[i])))
            name = parameter_name(groups, index)
            dtype = str(param.dtype).removeprefix("torch.")
            facts.append((f"shape of {name}", str(tuple(param.shape))))
            facts.append((f"dtype of {name}", dtype))
            facts.append((f"requires_grad of {name}", str(param.requires_grad)))
            facts.append((f"group of {name}", str(group_index)))
    return facts


def step_facts(
    layout: ShardedLayout,
    hyper: list[list[tuple[str, Any]]],
    counters: Sequence[int],
    more: Facts,
) -> Facts:
    """What the ranks must have in common at every step, in the order of looking."""
    facts = [*more]
    for i, options in enumerate(hyper):
        facts += [(f"{name} of group {i}", repr(value)) for name, value in options]
    pairs = zip(layout.names, counters, strict=True)
    facts += [(f"step of {name}", str(count)) for name, count in pairs]
    return facts
