"""save_checkpoint: everything is written aside and synced, then one rename makes it count.

```
   every rank   names, plan | its data file, fsync |                                   | result
   rank 0       mkdir tmp   |                      | .metadata, manifest, fsync, rename | clean up
```
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from feinwerk import _checks
from feinwerk.distributed.checkpoint import directories, values
from feinwerk.distributed.checkpoint.agreement import ARGUMENTS, Peers
from feinwerk.distributed.checkpoint.manifest import Group, Manifest
from feinwerk.distributed.checkpoint.names import (
    model_tensors,
    optimizer_parameters,
    release_of,
    state_items,
)
from feinwerk.distributed.checkpoint.writer import write_tensors
from feinwerk.distributed.errors import CheckpointError
from feinwerk.optim.errors import Disagreement
from feinwerk.optim.state import is_dtensor

_OP = "save_checkpoint"


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    parameters: Literal["trainable", "all"] = "trainable",
    keep: int | None = 3,
    extra: Any = None,
    rank_extra: Any = None,
    scheduler: Any = None,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> Path:
    """Save model and optimizer as `directory/step-<step>`, whole or not at all.

    Every rank writes what it holds, into a temporary directory, and computes a checksum of every
    tensor; rank 0 seals the directory with a manifest and renames it. A crash at any moment leaves
    the checkpoints that were there, and nothing that `load_latest` takes for one. The files are
    DCP's: `torch.distributed.checkpoint` and its tools read them. Every rank of the group calls
    this at the same step; the directory must be the same for all, on one file system.

    Args:
        directory: where the checkpoints of this training are; created if missing.
        step: its number, 0 or more. A step that exists is an error: nothing is overwritten.
        model: bare, compiled, under DDP or under FSDP2; trained parameters are plain tensors,
            equal on all ranks, or DTensors.
        optimizer: `feinwerk.optim.AdamW`, `ShardedAdamW`, or another whose states are tensors.
        parameters: "trainable" saves the parameters that require gradients and the persistent
            buffers, so that adapters are saved without the base; "all" the whole state dict.
        keep: how many complete checkpoints stay, this one included; the steps with the highest
            numbers do. None keeps all.
        extra: anything made of None, bool, int, float, str, list, tuple, dict and tensors, such as
            the position in the data; stored in the manifest, rank 0's value counts.
        rank_extra: the same, but every rank's own value is stored, such as
            `torch.get_rng_state()`; it comes back on the same rank if the world size is the same.
        scheduler: a learning-rate scheduler whose `state_dict()` is made of such values.
        process_group: the ranks that take part; default all.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Returns:
        The path of the new checkpoint.

    Raises:
        CheckpointError: on every rank, if one of them failed (disk full, step exists, ...). There
            is no new checkpoint then, the old ones are intact, and training can go on.
        Disagreement: if the ranks do not save the same tensors with the same options.
        PeerFailure: if another rank died.
        PhaseTimeout: if another rank did not finish a phase in time.
        TypeError: if extra, a state or an option of a group cannot be stored.
        ValueError: if an argument breaks its rule.

    Source:
        The layout of the files: torch.distributed.checkpoint; the manifest: docs/guides.

    Example:
        >>> import tempfile
        >>> from feinwerk.optim import AdamW
        >>> model = nn.Linear(4, 2)
        >>> optimizer = AdamW(model.parameters())
        >>> save_checkpoint(tempfile.mkdtemp(), 10, model, optimizer).name
        'step-10'
    """
    peers = Peers(_OP, process_group, timeout)
    directory = Path(directory)
    collected: list[_Content] = []

    def collect() -> tuple[str, Any]:
        _check(step, keep)
        content = _collect(step, model, optimizer, parameters, scheduler, extra)
        collected.append(content)
        return content.digest(), values.encode(_OP, "rank_extra", rank_extra)

    gathered = peers.together(ARGUMENTS, collect)
    content = collected[0]
    if len({digest for digest, _ in gathered}) > 1:
        _name_difference(peers.together("compare", content.outline))

    nonce, temporary = peers.first("create", lambda: _create(directory, step))
    final = temporary.with_name(directories.name_of_step(step))
    try:
        written = write_tensors(peers, temporary, content.tensors, release_of(optimizer))

        def commit() -> bool:
            assert written is not None  # this runs on rank 0
            files = written.finish(temporary, final.name, nonce)
            manifest = replace(
                content.manifest, world_size=peers.world_size, nonce=nonce, files=files,
                tensors=written.tensors(), rank_extra=[own for _, own in gathered],
            )  # fmt: skip
            problem = manifest.find_gap()
            if problem:
                raise CheckpointError(f"{_OP}: what was written has a hole: {problem}")
            return directories.commit(temporary, final, manifest.to_bytes())

        durable = peers.first("commit", commit)
    except CheckpointError:
        if peers.is_first:
            directories.discard(temporary)
        raise
    if peers.is_first and durable:
        directories.clean(final.parent, keep, final, nonce)
    return final


@dataclass(frozen=True)
class _Content:
    """What one rank brings: nested tensors, and the manifest without what is written."""

    tensors: dict[str, Any]
    manifest: Manifest

    def outline(self) -> list[str]:
        """Return, line by line, what all ranks must agree on."""
        lines = [f"step {self.manifest.step}", f"parameters {self.manifest.parameters}"]
        for name, tensor in self.tensors["model"].items():
            lines.append(f"model.{name} {tensor.dtype} {list(tensor.shape)}")
        for name, state in self.tensors["optimizer"].items():
            for key, tensor in state.items():
                lines.append(f"optimizer.{name}.{key} {tensor.dtype} {list(tensor.shape)}")
        for index, group in enumerate(self.manifest.groups):
            lines.append(f"parameter group {index} of {', '.join(group.parameters)}")
            lines += [f"option {key} {value}" for key, value in sorted(group.options.items())]
        return lines

    def digest(self) -> str:
        """Return a hash of the outline."""
        return hashlib.sha256("\n".join(self.outline()).encode()).hexdigest()


def _create(directory: Path, step: int) -> tuple[str, Path]:
    nonce = secrets.token_hex(8)
    return nonce, directories.start(directory, step, nonce)


def _name_difference(outlines: list[list[str]]) -> None:
    for lines in itertools.zip_longest(*outlines, fillvalue="nothing"):
        held: dict[str, list[int]] = {}
        for rank, line in enumerate(lines):
            held.setdefault(line, []).append(rank)
        if len(held) > 1:
            raise Disagreement(_OP, "what is saved", held)


def _check(step: int, keep: int | None) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        _checks.reject(TypeError, _OP, "step", "be an int", type(step).__name__)
    if step < 0:
        _checks.reject(ValueError, _OP, "step", "be at least 0", step)
    if keep is not None and keep < 1:
        _checks.reject(ValueError, _OP, "keep", "be at least 1, or None", keep)


def _collect(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: str,
    scheduler: Any,
    extra: Any,
) -> _Content:
    own = model_tensors(_OP, model, parameters).all()
    states: dict[str, dict[str, torch.Tensor]] = {}
    groups = []
    sharded = replicated = False
    for members, group in zip(
        optimizer_parameters(_OP, model, optimizer), optimizer.param_groups, strict=True
    ):
        for name, parameter in members:
            state = dict(state_items(_OP, name, optimizer.state.get(parameter, {})))
            if state:
                states[name] = state
            sharded |= is_dtensor(parameter)
            replicated |= not is_dtensor(parameter) and any(map(is_dtensor, state.values()))
        options = {
            key: values.encode(_OP, f"the option {key}", value)
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        groups.append(Group(tuple(name for name, _ in members), options))
    manifest = Manifest(
        step=step,
        world_size=1,
        engine="fsdp2" if sharded else "sharded" if replicated else "plain",
        parameters=parameters,
        nonce="",
        torch=str(torch.__version__),
        optimizer_class=type(optimizer).__name__,
        groups=tuple(groups),
        tensors={},
        files={},
        scheduler=None if scheduler is None else _scheduler_state(scheduler),
        extra=values.encode(_OP, "extra", extra),
    )
    return _Content({"model": own, "optimizer": states}, manifest)


def _scheduler_state(scheduler: Any) -> Any:
    if not callable(getattr(scheduler, "state_dict", None)):
        _checks.reject(TypeError, _OP, "scheduler", "have a state_dict()", type(scheduler))
    return values.encode(_OP, "scheduler.state_dict()", scheduler.state_dict())
