"""load_latest and load_checkpoint: found, matched and verified on every rank before anything moves.

```
   find -> read the manifest -> match names, shapes, formats -> verify checksums | read -> apply
                        nothing has changed up to here, on any rank              |
```
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from feinwerk.distributed.checkpoint import directories, manifest, values
from feinwerk.distributed.checkpoint.agreement import ARGUMENTS, Peers
from feinwerk.distributed.checkpoint.manifest import Manifest
from feinwerk.distributed.checkpoint.names import release_of
from feinwerk.distributed.checkpoint.reader import read_tensors
from feinwerk.distributed.checkpoint.targets import Targets, find_targets
from feinwerk.distributed.checkpoint.verify import find_damage
from feinwerk.distributed.errors import (
    CheckpointError,
    CorruptShard,
    IncompleteCheckpoint,
    MismatchedCheckpoint,
)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was loaded, beside the tensors.

    Attributes:
        step: of the checkpoint.
        path: of the checkpoint.
        extra: as given to `save_checkpoint`.
        rank_extra: what this rank gave; None if the world size is another one.
        world_size: of the training that wrote it.
        engine: "plain", "sharded" or "fsdp2": what wrote it.
    """

    step: int
    path: Path
    extra: Any
    rank_extra: Any
    world_size: int
    engine: str


def load_latest(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    scheduler: Any = None,
    verify: bool = True,
    fall_back: bool = False,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> LoadedCheckpoint | None:
    """Load the latest complete checkpoint in a directory, if there is one.

    What a crash left behind is never taken for a checkpoint. Every rank of the group calls this;
    rank 0 chooses. See `load_checkpoint` for what loading does.

    Args:
        directory: as given to `save_checkpoint`; it need not exist.
        model: to load into.
        optimizer: to load into; None loads the model alone.
        scheduler: to load into.
        verify: compare all checksums first.
        fall_back: if the latest checkpoint is damaged, warn and load the one before.
        process_group: the ranks that take part; default all.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Returns:
        What was loaded, or None if the directory has no complete checkpoint.

    Raises:
        CheckpointError: as `load_checkpoint` does.
        PeerFailure: if another rank died.
        PhaseTimeout: if another rank did not finish a phase in time.

    Example:
        >>> from feinwerk.optim import AdamW
        >>> model = nn.Linear(4, 2)
        >>> load_latest("no-such-directory", model, AdamW(model.parameters())) is None
        True
    """
    op = "load_latest"
    peers = Peers(op, process_group, timeout)
    found = peers.first("find", lambda: directories.list_checkpoints(Path(directory).absolute()))
    for index in reversed(range(len(found))):
        path = found[index].path
        try:
            return _load(op, peers, path, model, optimizer, scheduler, verify)
        except (CorruptShard, IncompleteCheckpoint) as error:
            if index == 0:
                raise
            previous = found[index - 1].path.name
            if not fall_back:
                offer = f"{error.reason}; fall_back=True would go back to {previous}"
                if isinstance(error, CorruptShard):
                    raise CorruptShard(error.file, error.parameter, error.rank, offer) from error
                raise IncompleteCheckpoint(error.path, offer) from error
            warnings.warn(f"{op}: going back to {previous}: {error}", stacklevel=2)
    return None


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    scheduler: Any = None,
    verify: bool = True,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> LoadedCheckpoint:
    """Load one checkpoint into a model and an optimizer, of any engine and world size.

    Parameters, buffers and states get the bits that were saved, whatever the sharding then and
    there. States that a new optimizer does not have yet are allocated. The options of the parameter
    groups (lr, betas, ...) are restored as `load_state_dict` does. Up to the end of verification
    nothing is changed; only a disk that fails while the verified tensors are read leaves model and
    optimizer half loaded; then the error's `partly_loaded` is true.

    Args:
        path: of one checkpoint, `<directory>/step-<N>`.
        model: with the parameters, shapes and dtypes of the checkpoint; nothing is cast.
        optimizer: over the same parameters in the same groups and order, with states of the same
            format; None loads the model alone.
        scheduler: required if the checkpoint has one, unless optimizer is None.
        verify: compare all checksums first; every rank reads its share of the files for that.
        process_group: the ranks that take part; default all.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Returns:
        Step, path, extra, and what wrote it.

    Raises:
        IncompleteCheckpoint: if the directory is no complete checkpoint.
        CorruptShard: if a file is missing, short, another checkpoint's or damaged.
        MismatchedCheckpoint: if it is one of another model, optimizer or state format.
        CheckpointError: for any other failure, on every rank.
        PeerFailure: if another rank died.
        PhaseTimeout: if another rank did not finish a phase in time.
    """
    op = "load_checkpoint"
    peers = Peers(op, process_group, timeout)
    return _load(op, peers, Path(path), model, optimizer, scheduler, verify)


def _load(
    op: str,
    peers: Peers,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    verify: bool,
) -> LoadedCheckpoint:
    # Rank 0's file, so that all load the same checkpoint.
    path, text = peers.first("reading the manifest", lambda: (path.absolute(), manifest.read(path)))
    matched: list[tuple[Manifest, Targets]] = []

    def match() -> None:
        content = Manifest.from_bytes(path / manifest.FILE_NAME, text)
        matched.append((content, find_targets(op, path, content, model, optimizer)))
        if optimizer is not None:
            _match_scheduler(path, content, scheduler)

    peers.together(ARGUMENTS, match)
    content, targets = matched[0]

    def check() -> None:
        damage = find_damage(path, content, peers.rank, peers.world_size)
        if damage:
            raise damage[0]

    if verify:
        peers.together("verification", check)
    try:
        release = release_of(optimizer)
        peers.together(
            "reading", lambda: read_tensors(path, content, targets.tensors, verify, release)
        )
        peers.together("applying", lambda: _apply(content, targets, model, optimizer, scheduler))
    except CheckpointError as error:
        error.partly_loaded = True
        raise
    own = content.rank_extra[peers.rank] if content.world_size == peers.world_size else None
    return LoadedCheckpoint(
        content.step, path, values.decode(content.extra), values.decode(own),
        content.world_size, content.engine,
    )  # fmt: skip


def _match_scheduler(path: Path, content: Manifest, scheduler: Any) -> None:
    state = "the state of a scheduler"
    if scheduler is not None and content.scheduler is None:
        raise MismatchedCheckpoint(str(path), missing=[state])
    if scheduler is None and content.scheduler is not None:
        raise MismatchedCheckpoint(str(path), unexpected=[f"{state} (pass scheduler=)"])


def _apply(
    content: Manifest,
    targets: Targets,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
) -> None:
    if targets.made:
        _load_made(model, targets.made)
    if optimizer is None:
        return
    for parameter, state in targets.new_states:
        optimizer.state[parameter] = state
    for parameter in targets.stateless:
        optimizer.state.pop(parameter, None)
    for group, saved in zip(optimizer.param_groups, content.groups, strict=True):
        for key, value in values.decode(saved.options).items():
            current = group.get(key)
            if isinstance(current, torch.Tensor):
                current.copy_(torch.as_tensor(value))  # captured graphs and schedulers hold it
            else:
                group[key] = value
    if scheduler is not None:
        scheduler.load_state_dict(values.decode(content.scheduler))


def _load_made(model: nn.Module, made: dict[str, torch.Tensor]) -> None:
    """Give each module the state dict that has its own tensors, read by now, and the made ones."""
    state_dict = model.state_dict()
    state_dict.update(made)
    model.load_state_dict(state_dict)
