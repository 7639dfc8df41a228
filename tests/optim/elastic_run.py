"""A training under torchrun that goes on with as many ranks as there are; one node may be lost.

    torchrun ... elastic_run.py <folder> <step> <who>

In the backward of that step, on the first attempt, `rank-1` dies; or the process of `node-b` does,
after killing its agent: a machine is lost. Processes write what happens to them into the folder.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from feinwerk.distributed import load_latest, save_checkpoint
from feinwerk.optim import ShardingError
from feinwerk.optim.collectives import on_reached
from tests.optim.fault_training import STEPS, digest, model_and_optimizer, train_one


def main(folder: str, fatal_step: str, who: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def log(*words: object) -> None:
        with open(Path(folder) / f"log-{os.environ['NODE']}", "a") as file:
            print(*words, file=file)

    model, optimizer = model_and_optimizer(timeout=10, first_step_timeout=30)
    checkpoints = Path(folder) / "checkpoints"
    loaded = load_latest(checkpoints, model, optimizer, timeout=30)
    first = 0 if loaded is None else loaded.step
    log("start", rank, world_size, first)

    def at(point: str) -> None:
        if attempt or step != int(fatal_step) or point != "backward hook":
            return
        if who == f"node-{os.environ['NODE']}":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if who == f"rank-{rank}":
            os.kill(os.getpid(), signal.SIGKILL)

    step = first
    on_reached(at)
    begin = time.monotonic()
    try:
        for step in range(first + 1, STEPS + 1):
            begin = time.monotonic()
            train_one(model, optimizer, rank, step)
            save_checkpoint(checkpoints, step, model, optimizer, keep=None, timeout=10)
    except ShardingError as error:
        log(type(error).__name__, error.phase, round(time.monotonic() - begin, 1))  # type: ignore[attr-defined]
        raise
    log("end", digest(model, optimizer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
