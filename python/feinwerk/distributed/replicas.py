"""verify_replicas: finds out whether ranks that should hold the same tensors do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from feinwerk import _checks
from feinwerk.optim.errors import Disagreement
from feinwerk.optim.tensor_hash import hash_bytes

_OP = "verify_replicas"
_Group = dist.ProcessGroup


def verify_replicas(
    model_or_tensors: nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor],
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> int:
    """Compare the tensors that ranks hold in common, bit for bit; collective.

    A DTensor is compared along the dimensions of its mesh where it is replicated: under HSDP, the
    shards of equal rows. Shards alone have nothing to be compared with. A plain tensor, of DDP or
    one that fully_shard ignores, is compared over all of `group`. A model's buffers count as well.
    Only hashes of 64 bits are sent. Blocks that fully_shard has left gathered are resharded first.

    Args:
        model_or_tensors: a module, named tensors, or a list of them.
        group: all ranks concerned, for plain tensors and for the verdict: a process group or a
            mesh; default the mesh of the first DTensor, without one all ranks.

    Returns:
        How many tensors had a replica to be compared with.

    Raises:
        TypeError: if what is given is none of these.
        Disagreement: on every rank, naming the first tensor that differs and who holds which.

    Source:
        docs/guides/fsdp2.md.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    tensors = _named(model_or_tensors)
    if group is None:
        group = next((t.device_mesh for t in tensors.values() if isinstance(t, DTensor)), None)
    everyone = _groups_of(group)
    by_group: dict[int, tuple[_Group, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        for one in _replicas(tensor) if isinstance(tensor, DTensor) else everyone:
            if dist.get_world_size(one) > 1:
                by_group.setdefault(id(one), (one, {}))[1][name] = tensor
    found = [_difference(one, members) for one, members in by_group.values()]
    verdict = next((difference for difference in found if difference), None)
    for one in everyone:  # ranks whose own replicas agree must stop, too
        verdicts: list[Any] = [None] * dist.get_world_size(one)
        dist.all_gather_object(verdicts, verdict, group=one)
        verdict = next((difference for difference in verdicts if difference), None)
    if verdict is not None:
        raise Disagreement(_OP, *verdict, "be the same on all its replicas")
    return len({name for _, members in by_group.values() for name in members})


def _named(given: Any) -> dict[str, torch.Tensor]:
    if isinstance(given, nn.Module):
        reshard(given)
        return {**dict(given.named_parameters()), **dict(given.named_buffers())}
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Iterable) and not isinstance(given, torch.Tensor):
        named = {str(i): tensor for i, tensor in enumerate(given)}
    else:
        rule = "be a torch.nn.Module, a dict or a list of tensors"
        _checks.reject(TypeError, _OP, "model_or_tensors", rule, type(given).__name__)
    for name, tensor in named.items():
        _checks.tensor(_OP, name, tensor)
    return named


def reshard(model: nn.Module) -> None:
    """Let every block that fully_shard has left gathered hold its shards alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _groups_of(group: Any) -> list[_Group]:
    """Groups that connect all ranks concerned, one after the other."""
    if isinstance(group, DeviceMesh):
        return [group.get_group(dim) for dim in range(group.ndim)]
    if group is None:
        return [dist.group.WORLD] if dist.group.WORLD is not None else []
    if not isinstance(group, dist.ProcessGroup):
        rule = "be a process group, a DeviceMesh or None"
        _checks.reject(TypeError, _OP, "group", rule, type(group).__name__)
    return [group]


def _replicas(tensor: DTensor) -> list[_Group]:
    mesh = tensor.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    ]


def _difference(
    group: _Group, members: dict[str, torch.Tensor]
) -> tuple[str, dict[str, list[int]]] | None:
    """Exchange (name, what it is, hash) of every tensor; the first that differs, and who has it."""
    mine = [(name, *_fingerprint(tensor)) for name, tensor in members.items()]
    theirs: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    for position in range(max(map(len, theirs))):
        held: dict[str, list[int]] = {}
        for rank, entries in zip(ranks, theirs, strict=True):
            value = "no tensor"
            if position < len(entries):
                name, kind, hashed = entries[position]
                value = f"{name}, {kind}, with hash {hashed:016x}"
            held.setdefault(value, []).append(rank)
        if len(held) > 1:
            names = [entries[position][0] for entries in theirs if position < len(entries)]
            return names[0], held
    return None


def _fingerprint(tensor: torch.Tensor) -> tuple[str, int]:
    """What a tensor is, and a hash of the bytes held here."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(local.shape)}"
    return kind, 0 if local.is_meta else hash_bytes(local)
