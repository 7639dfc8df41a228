"""Runs modules and scripts under torchrun, killed as a whole when they take long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent


def torchrun(ranks: int, *target: str, folder: Path = ROOT, timeout: float = 180) -> str:
    """Run torchrun on several ranks of this machine, in a folder; return what it printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", *target,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{target} took more than {timeout} s: {error.output}") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output


def run_torchrun(module: str, ranks: int, *args: str, timeout: float = 180) -> list[Any]:
    """Run `python -m <module> <args> <folder>` on several ranks.

    Rank r leaves its result in <folder>/r.json; returned are those of all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        torchrun(ranks, "-m", module, *args, folder, timeout=timeout)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


@dataclass(frozen=True)
class Runs:
    """What the ranks of a first run have done, and left in a folder."""

    folder: Path
    reports: list[dict[str, Any]]


def saved_by_two(module: str, kinds: list[str], folder: Path) -> Runs:
    """Two ranks train and save each kind in a folder, and resume it."""
    return Runs(folder, run_torchrun(module, 2, *kinds, "save", str(folder)))


def report_kinds(run: Callable[[Path, str, bool], dict[str, Any]]) -> None:
    """What such a module does: `run(folder, kind, whether to resume)` for every kind named.

    The command line is kinds, "save" or "resume", the folder of the training, that of reports.
    """
    torch.set_num_threads(1)
    *kinds, resume, folder, results = sys.argv[1:]
    report = {kind: run(Path(folder), kind, resume == "resume") for kind in kinds}
    if resume == "save":
        report |= {f"{kind} again": run(Path(folder), kind, True) for kind in kinds}
    Path(results, f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()  # gloo's threads, still running at the exit, may abort it
