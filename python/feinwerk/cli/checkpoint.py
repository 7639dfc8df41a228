"""The quickstart's checkpoint: one file, replaced atomically, so that a kill never leaves half."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from feinwerk.cli.errors import CommandError

FILE_NAME = "checkpoint.pt"
FORMAT = 2


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Write `state` beside the old checkpoint, then put it in its place.

    Args:
        directory: the run's output folder.
        state: tensors, numbers, strings, lists and dicts only.

    Raises:
        CommandError: if the file cannot be written; the old checkpoint is then still there.
    """
    path = directory / FILE_NAME
    unfinished = directory / f".{FILE_NAME}.unfinished"
    try:
        with unfinished.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(directory)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise CommandError(f"quickstart: cannot write the checkpoint {path}: {error}") from error
    return path


def load(directory: Path) -> dict[str, Any]:
    """Read the checkpoint of a run.

    Raises:
        CommandError: if there is none, or it is damaged or of another format.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise CommandError(f"quickstart: --resume needs a checkpoint, none at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CommandError(f"quickstart: the checkpoint {path} is damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"quickstart: {path} is not a checkpoint of this version of feinwerk")
    return state


def step_of(directory: Path) -> int | None:
    """Return the step of the checkpoint in `directory`, None where there is no readable one."""
    try:
        return int(load(directory)["step"])
    except (CommandError, KeyError):
        return None


def _sync_folder(directory: Path) -> None:
    """Make the rename itself durable, where the system allows to sync a folder."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
