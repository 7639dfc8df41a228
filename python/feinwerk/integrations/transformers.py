"""The Trainer of transformers with sharded optimizer states: checkpoints that every rank is in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from feinwerk.distributed import CheckpointError, load_latest, save_checkpoint
from feinwerk.distributed.checkpoint.agreement import Peers

_FOLDER = "feinwerk"
_TRAINERS_OWN = "optimizer.pt"


class ShardedCheckpoint(TrainerCallback):
    """Save and resume `ShardedAdamW` under the Trainer, on any number of ranks.

    The Trainer saves the optimizer of rank 0 alone, which has a part of the states. This callback
    puts `feinwerk.distributed.save_checkpoint` beside it, in `checkpoint-<step>/feinwerk`: states,
    trained parameters and the scheduler, in one format for any world size; it removes the
    Trainer's partial `optimizer.pt`. When training resumes, it loads them after the Trainer has
    loaded the rest, or raises: states are never silently new ones.

        Trainer(
            ...,
            optimizer_cls_and_kwargs=(ShardedAdamW, {"lr": 1e-4, "reduce_gradients": False}),
            callbacks=[ShardedCheckpoint()],
        )

    `reduce_gradients=False` because the Trainer wraps the model in DDP, which averages them.
    The plain `AdamW` needs no callback: every rank has all its states.

    Args:
        resume_from: the Trainer's checkpoint that training resumes from, if it is not
            `checkpoint-<step>` in `output_dir`, such as one of another run.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Raises:
        CheckpointError: in training, on every rank, if a checkpoint cannot be saved or loaded, or
            is not there to resume from.

    Example:
        >>> ShardedCheckpoint().folder("out", 100).as_posix()
        'out/checkpoint-100/feinwerk'
    """

    def __init__(
        self, resume_from: str | os.PathLike[str] | None = None, timeout: float = 600.0
    ) -> None:
        """Nothing is read or written yet."""
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.timeout = timeout

    def folder(self, output_dir: str | os.PathLike[str], step: int) -> Path:
        """Return where the checkpoint of a step is.

        Args:
            output_dir: of the TrainingArguments.
            step: the Trainer's global step.
        """
        return Path(output_dir) / f"checkpoint-{step}" / _FOLDER

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save what the Trainer cannot; every rank calls it."""
        if args.save_only_model:
            return
        folder = self.folder(str(args.output_dir), state.global_step)
        # The Trainer has just written over what was beside it: of an earlier run from here on.
        peers = Peers("ShardedCheckpoint", None, self.timeout)
        peers.first("clear", lambda: shutil.rmtree(folder) if folder.exists() else None)
        save_checkpoint(
            folder, state.global_step, kwargs["model"], _bare(kwargs["optimizer"]),
            scheduler=kwargs["lr_scheduler"], timeout=self.timeout,
        )  # fmt: skip
        if args.should_save:
            # The states of rank 0 alone: loaded, they would be taken for everybody's.
            (folder.parent / _TRAINERS_OWN).unlink(missing_ok=True)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Load it after the Trainer has loaded its own; every rank calls it."""
        if state.global_step == 0:
            return
        folder = self.folder(str(args.output_dir), state.global_step)
        if self.resume_from is not None:
            folder = self.resume_from / _FOLDER
        loaded = load_latest(
            folder, kwargs["model"], _bare(kwargs["optimizer"]),
            scheduler=kwargs["lr_scheduler"], timeout=self.timeout,
        )  # fmt: skip
        if loaded is None or loaded.step != state.global_step:
            got = "nothing" if loaded is None else f"step {loaded.step}"
            raise CheckpointError(
                f"ShardedCheckpoint: {folder} must hold step {state.global_step}, got {got} (pass "
                "resume_from= if the checkpoint is elsewhere)"
            )


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Unwrap what accelerate has wrapped."""
    while not hasattr(optimizer, "empty_state") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    bare: torch.optim.Optimizer = optimizer
    return bare
