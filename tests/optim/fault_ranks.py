"""Ranks that may die, stop or fail: how each of them ended, within a hard limit of time.

Ranks are forked from a server process that has imported what they need, so that a test can
afford a fresh set of them for each fault.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.optim.processes import server


@dataclass
class Ending:
    """How one rank ended.

    Attributes:
        signal: that ended it, or None.
        result: what its function returned.
        error: what its function raised.
        text: the traceback.
        seconds: from the start of all ranks to this end.
        stuck: whether it was still there at the limit and had to be killed.
    """

    signal: int | None = None
    result: Any = None
    error: BaseException | None = None
    text: str = ""
    seconds: float = 0.0
    stuck: bool = False


def run_to_the_end(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    group_timeout: float = 60,
    limit: float = 60,
    stopped: tuple[int, ...] = (),
) -> list[Ending]:
    """Run `function(rank, world_size, *args)` on every rank and say how each ended.

    Args:
        function: at the top of a module.
        world_size: how many ranks; the default group is gloo's.
        args: pickled.
        group_timeout: of the default group, in seconds.
        limit: seconds after which a rank is stuck; none is left running.
        stopped: ranks that stop themselves: nobody waits for them.
    """
    context = server()
    endings = [Ending() for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        waiting: dict[Connection, int] = {}
        processes = []
        start = time.monotonic()
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            store = os.path.join(folder, "store")
            job = (theirs, function, rank, world_size, store, group_timeout, args)
            process = context.Process(target=_rank, args=job, daemon=True)
            process.start()
            theirs.close()
            waiting[ours] = rank
            processes.append(process)
        try:
            while set(waiting.values()) - set(stopped):
                ready: Any = wait(list(waiting), max(0.0, start + limit - time.monotonic()))
                if not ready:
                    break
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    ending = endings[rank]
                    ending.seconds = time.monotonic() - start
                    try:
                        ending.result, ending.error, ending.text = pickle.loads(pipe.recv_bytes())
                    except EOFError:  # died without a word
                        process = processes[rank]
                        process.join()
                        ending.signal = -(process.exitcode or 0)
        finally:
            for rank in waiting.values():
                endings[rank].stuck = True
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
    return endings


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    group_timeout: float,
    args: tuple[Any, ...],
) -> None:
    """What a process does."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    outcome: tuple[Any, BaseException | None, str]
    try:
        limit = timedelta(seconds=group_timeout)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit
        )
        outcome = (function(rank, world_size, *args), None, "")
    except BaseException as error:
        outcome = (None, error, traceback.format_exc())
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception as error:
        data = pickle.dumps((None, RuntimeError(f"{error}: {outcome!r}"), outcome[2]))
    pipe.send_bytes(data)
    pipe.close()
    # Ranks that end early would break the connections of those that are still at it.
    if outcome[1] is None:
        with contextlib.suppress(Exception):
            dist.barrier()
    os._exit(0)


def die() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop this process: it keeps its connections and says nothing."""
    os.kill(os.getpid(), signal.SIGSTOP)
