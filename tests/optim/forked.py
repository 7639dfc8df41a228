"""Runs a function in a forked child: cheap enough to kill one at every system call.

Only for functions that use torch on one thread: a child has none of its parent's threads.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import torch


def fork(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Start `function(*args)` in a child: its id, and a pipe that its pickled result comes by."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        os.close(reading)
        torch.set_num_threads(1)
        try:
            outcome: tuple[str, Any] = ("result", function(*args))
        except BaseException as error:
            outcome = ("error", error)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(outcome, pipe)
        code = 0
    finally:
        os._exit(code)


def wait_for(child: int, seconds: float = 60) -> int:
    """The wait status of a child, which is killed when it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child took more than {seconds} seconds")


def run_forked(function: Callable[..., Any], *args: Any) -> Any:
    """Return what `function(*args)` returns in a child, or raise what it raises there."""
    child, pipe = fork(function, *args)
    with os.fdopen(pipe, "rb") as stream:
        data = stream.read()
    status = wait_for(child)
    if status or not data:
        raise RuntimeError(f"a child ended with wait status {status}")
    kind, value = pickle.loads(data)
    if kind == "error":
        raise value
    return value
