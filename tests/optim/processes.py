"""run_ranks: runs a function on several ranks over gloo, in processes that cannot hang a test.

Ranks are forked from a server process that has imported what most of them need: importing it takes
a rank longer than most of what it is there for.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

_GRACE = 5.0  # seconds that the other ranks have to say what happened to them


# torch imports torch._dynamo for the first optimizer of a process.
_PRELOAD = [
    "torch", "torch.distributed", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "torch._dynamo", "feinwerk.optim", "feinwerk.distributed",
]  # fmt: skip


def server() -> ForkServerContext:
    """The context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90
) -> list[Any]:
    """Return [function(rank, world_size, *args) of every rank], run in processes of their own.

    `function` is at the top of a module, results and arguments are pickled. The default group is
    gloo's on this machine. An exception in a rank is raised here with its traceback; so is a rank
    that dies or has not returned after `timeout` seconds. No process outlives the call.
    """
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, function, rank, world_size, os.path.join(folder, "store"), timeout, args)
            process = context.Process(target=_rank, args=job, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process shows as the end of the pipe
            pipes[ours] = rank
            processes.append(process)
        try:
            results, failures = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failures))
    return [results[rank] for rank in range(world_size)]


def _collect(
    pipes: dict[Connection, int], deadline: float
) -> tuple[dict[int, Any], list[tuple[int, str]]]:
    """Results by rank, and failures in the order in which they came."""
    results: dict[int, Any] = {}
    failures: list[tuple[int, str]] = []
    waiting = dict(pipes)
    while waiting:
        ready: Any = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures += [(rank, "did not return in time") for rank in waiting.values()]
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                done, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                done, value = False, "died without a word"
            if done:
                results[rank] = value
            else:
                failures.append((rank, value))
                deadline = min(deadline, time.monotonic() + _GRACE)
    return results, failures


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    """What a process does."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        message = pickle.dumps((True, function(rank, world_size, *args)))
        dist.barrier()  # a rank that leaves early would break the others' connections
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    # Without destroy_process_group, which waits for peers that may be gone.
    os._exit(0)
