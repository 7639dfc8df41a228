"""The directories of checkpoints: which are complete, how one becomes complete, which may go.

```
   step-100/                 complete: it got this name by one rename, after everything was synced
   step-200.tmp-<nonce>/     being written, or left behind by a crash
   step-50.old-<nonce>/      being removed, or left behind by a crash
```
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from feinwerk.distributed.checkpoint import manifest
from feinwerk.distributed.checkpoint.files import new_file, remove_directory, sync
from feinwerk.distributed.errors import CheckpointError

_COMPLETE = re.compile(r"step-(0|[1-9]\d*)")
_LEFT_BEHIND = re.compile(r"step-\d+\.(tmp|old)-[0-9a-f]+")


@dataclass(frozen=True, order=True)
class StoredCheckpoint:
    """A complete checkpoint in a directory.

    Attributes:
        step: its number.
        path: its own directory.
    """

    step: int
    path: Path


def name_of_step(step: int) -> str:
    """Return the name of the directory of a step."""
    return f"step-{step}"


def list_checkpoints(directory: str | os.PathLike[str]) -> list[StoredCheckpoint]:
    """List the complete checkpoints in a directory, the latest last.

    Complete means that a save has finished; nothing is read but names. What a crash left behind is
    not listed.

    Args:
        directory: as given to `save_checkpoint`; it need not exist.

    Returns:
        Step and path of each, by increasing step.

    Example:
        >>> list_checkpoints("no-such-directory")
        []
    """
    found = []
    try:
        entries = list(os.scandir(directory))
    except FileNotFoundError:
        return []
    for entry in entries:
        match = _COMPLETE.fullmatch(entry.name)
        path = Path(entry.path)
        if match and (path / manifest.FILE_NAME).is_file():
            found.append(StoredCheckpoint(int(match[1]), path))
    return sorted(found)


def start(directory: Path, step: int, nonce: str) -> Path:
    """Create and return the temporary directory of a save.

    Raises:
        CheckpointError: if the step has a directory already.
    """
    _make(directory.absolute())
    final = directory / name_of_step(step)
    if final.exists():
        raise CheckpointError(
            f"save_checkpoint: step must be new, got {step}: {final} exists, and nothing is "
            "overwritten"
        )
    temporary = directory / f"{final.name}.tmp-{nonce}"
    os.mkdir(temporary)
    return temporary


def _make(directory: Path) -> None:
    """Create a directory and what is missing above it, each name synced."""
    if not directory.is_dir():
        _make(directory.parent)
        os.mkdir(directory)
        sync(directory.parent)


def commit(temporary: Path, final: Path, text: bytes) -> bool:
    """Seal a temporary directory with its manifest and give it its name.

    If the name cannot be made durable it is taken back: after an error there is no new checkpoint.

    Returns:
        Whether the checkpoint is durable: not if the name could neither be synced nor taken back.
    """
    with new_file(temporary / manifest.FILE_NAME) as file:
        file.write(text)
    sync(temporary)
    os.rename(temporary, final)
    try:
        sync(final.parent)
    except OSError as error:
        try:
            os.rename(final, temporary)
        except OSError:
            warnings.warn(
                f"save_checkpoint: {final.name} is complete, but a power cut may take its name "
                f"away, and so the old checkpoints stay: {error}",
                stacklevel=2,
            )
            return False
        raise
    return True


def discard(temporary: Path) -> None:
    """Remove what a failed save has written, as far as the disk lets it."""
    shutil.rmtree(temporary, ignore_errors=True)


def clean(directory: Path, keep: int | None, newest: Path, nonce: str) -> None:
    """Remove what crashes left behind, and all complete checkpoints but the `keep` latest.

    The new checkpoint is safe by now, so what cannot be removed is a warning.
    """
    try:
        for entry in list(os.scandir(directory)):
            if _LEFT_BEHIND.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
        if keep is None:
            return
        for old in list_checkpoints(directory)[:-keep]:
            if old.path != newest:
                remove_directory(old.path, directory / f"{old.path.name}.old-{nonce}")
    except OSError as error:
        warnings.warn(
            f"save_checkpoint: {newest.name} is saved, but old checkpoints could not be removed: "
            f"{error}",
            stacklevel=2,
        )
