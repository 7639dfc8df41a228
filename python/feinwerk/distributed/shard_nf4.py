"""shard_nf4: makes the NF4 weights of a model ready for torch's fully_shard, to be cut by rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from feinwerk import _checks
from feinwerk.distributed.replicas import verify_replicas
from feinwerk.nn import nf4_rows
from feinwerk.nn.dora import DoRA
from feinwerk.nn.nf4_module import NF4Module

_OP = "shard_nf4"


@dataclass(frozen=True)
class ShardedWeight:
    """One NF4 weight that will be cut: its rows on this rank, and its bytes here and in whole.

    Padding counts: every rank holds as many rows as the first. `bytes` and `local_bytes` hold the
    codes and absmax; the nested tables of a double-quantized absmax (a 256th of it in fp32) are on
    every rank.
    """

    name: str
    shape: tuple[int, int]
    first_row: int
    rows: int
    bytes: int
    local_bytes: int


@dataclass
class ShardReport:
    """What shard_nf4 did.

    `replicated` says why a weight stays whole on every rank; its parameters are `ignored_params`,
    for the argument of that name of fully_shard.
    """

    layers: list[ShardedWeight] = field(default_factory=list)
    replicated: dict[str, str] = field(default_factory=dict)
    ignored_params: set[nn.Parameter] = field(default_factory=set)
    world_size: int = 1

    @property
    def bytes(self) -> int:
        """Of codes and absmax that will be cut, before."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def local_bytes(self) -> int:
        """Of codes and absmax that will be cut, on this rank."""
        return sum(layer.local_bytes for layer in self.layers)

    def __str__(self) -> str:
        """Summarize for people: the sizes in MiB, then each weight that stays whole."""
        whole, local = self.bytes / 2**20, self.local_bytes / 2**20
        lines = [
            f"{len(self.layers)} NF4 weights by rows over {self.world_size} ranks, "
            f"{whole:.1f} MiB -> {local:.1f} MiB a rank"
        ]
        lines += [f"  on every rank: {name} ({why})" for name, why in self.replicated.items()]
        return "\n".join(lines)


def shard_nf4(model: nn.Module, mesh: DeviceMesh, *, compare: bool = True) -> ShardReport:
    """Make the NF4 weights of a model ready for `fully_shard`, which then cuts them by rows.

    Call it when the adapters are in, before fully_shard; then call fully_shard as always:

        quantize_model(model); add_adapters(model, ...)
        report = shard_nf4(model, mesh)
        for block in model.layers:
            fully_shard(block, mesh=mesh, ignored_params=report.ignored_params)
        fully_shard(model, mesh=mesh, ignored_params=report.ignored_params)

    No value changes and nothing is sent here: the same bytes are seen as codes [N, K/2] and absmax
    [N, K/blocksize], both uint8 parameters, which fully_shard gathers for the forward and frees
    after it: a quarter of the bytes of a bf16 weight. Kernels, results and gradients are those
    of the whole weight, bit for bit; no dense weight is made. A MixedPrecisionPolicy leaves both
    tensors as they are. A weight whose blocks cross rows stays on every rank.

    Args:
        model: with NF4Linear and NF4Embedding inside, under adapters of Feinwerk or PEFT or none.
        mesh: the mesh for fully_shard; of a 2-D one (HSDP) the last dimension cuts.
        compare: make sure first that all ranks of the mesh hold the same NF4 weights (one pass over
            the bytes, one small message).

    Returns:
        The report: every weight that will be cut, what stays whole and why.

    Raises:
        NotImplementedError: with a torch before 2.12, whose fully_shard refuses uint8 parameters.
        TypeError: if model is no module or mesh no DeviceMesh.
        ValueError: if fully_shard was called before, the mesh has more than 2 dimensions, or an
            adapter is merged; nothing has been changed then.
        Disagreement: if the ranks do not hold the same weights; nothing has been changed then.

    Source:
        docs/guides/fsdp2.md.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    if not isinstance(model, nn.Module):
        _checks.reject(TypeError, _OP, "model", "be a torch.nn.Module", type(model).__name__)
    if not isinstance(mesh, DeviceMesh):
        _checks.reject(TypeError, _OP, "mesh", "be a DeviceMesh", type(mesh).__name__)
    check_torch(torch.__version__)
    if mesh.ndim > 2:
        rule = "have 1 dimension, or 2 for HSDP"
        _checks.reject(ValueError, _OP, "mesh", rule, mesh.ndim)
    found = _found(model)
    if compare:
        verify_replicas(_tensors(found), mesh)

    report = ShardReport(world_size=mesh.size(-1))
    first: dict[int, NF4Module] = {}
    keys = [id(module.weight) for _, module in found]  # while all of them are alive
    for (name, module), key in zip(found, keys, strict=True):
        why = nf4_rows.refusal(module.weight_shape, module.blocksize)
        nf4_rows.persist(module)
        if why:
            module.replicated_because = report.replicated[name] = why
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            report.ignored_params.add(weight)
            continue
        module.row_shards = report.world_size
        if key in first:
            if module is not first[key]:
                nf4_rows.share(module, first[key])
            continue
        first[key] = module
        if not module.by_rows:
            nf4_rows.view(module)
        report.layers.append(_layer(name, module, mesh))
    return report


def check_torch(version: str) -> None:
    """Reject a torch whose fully_shard does not take uint8 parameters (pytorch#177844)."""
    numbers = version.split("+")[0].split(".")
    if (int(numbers[0]), int(numbers[1])) < (2, 12):
        rule = "be at least 2.12: fully_shard refuses uint8 parameters before"
        _checks.reject(NotImplementedError, _OP, "torch", rule, version)


def _found(model: nn.Module) -> list[tuple[str, NF4Module]]:
    """The NF4 modules, after checks that nothing stands against viewing them by rows."""
    found = []
    for name, module in model.named_modules():
        if nf4_rows.is_managed(module):
            rule = "not be under fully_shard yet: call shard_nf4 before it"
            _checks.reject(ValueError, _OP, name or "model", rule, type(module).__name__)
        # Feinwerk's adapters tell it by a bool, PEFT's layers, too.
        if getattr(module, "merged", False) is True:
            rule = "be unmerged: the tensors for unmerge would stay whole"
            _checks.reject(ValueError, _OP, name, rule, "a merged adapter")
        if isinstance(module, DoRA):
            # From the whole weight, N floats: no forward has to find them.
            module.weight_norm()
        if isinstance(module, NF4Module):
            found.append((name, module))
    return found


def _tensors(found: list[tuple[str, NF4Module]]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, module in found:
        for part in ("weight", "absmax", *(nf4_rows.NESTED if module.double_quant else ())):
            tensors[f"{name}.{part}"] = getattr(module, part)
    return tensors


def _layer(name: str, module: NF4Module, mesh: DeviceMesh) -> ShardedWeight:
    N = module.weight_shape[0]
    size = -(-N // mesh.size(-1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * size, N)
    row_bytes = sum(tensor.nbytes for tensor in (module.weight, module.absmax)) // N
    return ShardedWeight(
        name, module.weight_shape, first, min(size, N - first), N * row_bytes, size * row_bytes
    )
