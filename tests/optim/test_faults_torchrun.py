"""torchrun restarts what died: with the same ranks, or with those that are left, bit by bit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from feinwerk.distributed import list_checkpoints
from tests.optim.fault_ranks import run_to_the_end
from tests.optim.fault_training import train

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 180.0

Agent = subprocess.Popen[bytes]


def start(folder: Path, node: str, who: str, *options: str) -> Agent:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "NODE": node, "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Otherwise restarted ranks find in the agent's store where the dead ones listened.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", *options,
        str(ROOT / "tests/optim/elastic_run.py"), str(folder), "4", who,
    ]  # fmt: skip
    with open(folder / f"out-{node}", "ab") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait(agent: Agent, seconds: float = LIMIT) -> int:
    try:
        return agent.wait(seconds)
    finally:
        agent.poll()
        if agent.returncode is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log(folder: Path, node: str) -> list[list[str]]:
    path = folder / f"log-{node}"
    text = path.read_text() if path.exists() else ""
    assert text, (folder / f"out-{node}").read_text()
    return [line.split() for line in text.splitlines()]


def resumed(folder: Path, tmp_path: Path, step: int, world_size: int) -> list[str]:
    """The digests of ranks that go on from a checkpoint without torchrun."""
    copy = tmp_path / "copy" / "checkpoints"
    copy.mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / f"step-{step}", copy / f"step-{step}")
    endings = run_to_the_end(train, world_size, str(tmp_path / "copy"))
    assert [ending.result.first for ending in endings] == [step] * world_size
    return [ending.result.digest for ending in endings]


def test_a_killed_rank_is_restarted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    options = "--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"
    agent = start(folder, "a", "rank-1", *options)
    assert wait(agent) == 0, (folder / "out-a").read_text()
    lines = log(folder, "a")
    # The survivor may not come to say that it met a PeerFailure: the agent ends it as well.
    lines = [line for line in lines if line[0] != "PeerFailure"]
    assert sorted(lines[:2]) == [["start", "0", "2", "0"], ["start", "1", "2", "0"]]
    assert sorted(lines[2:4]) == [["start", "0", "2", "3"], ["start", "1", "2", "3"]]
    digests = sorted(line[1] for line in lines[4:])
    assert digests == sorted(resumed(folder, tmp_path, 3, 2))


@pytest.mark.full
def test_a_lost_machine_leaves_a_smaller_world(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    port = free_port()

    def agent(node: str) -> Agent:
        # The agent of node a has the store; short times, so that the lost node is given up soon.
        settings = f"is_host={int(node == 'a')},join_timeout=120,last_call_timeout=3"
        settings += ",keep_alive_interval=1,keep_alive_max_attempt=3"
        return start(
            folder, node, "node-b", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
            "--monitor-interval=0.1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=test", f"--rdzv-conf={settings}",
        )  # fmt: skip

    a = agent("a")
    b = agent("b")
    try:
        assert wait(b) == -signal.SIGKILL
        assert wait(a) == 0, (folder / "out-a").read_text()
    finally:
        for one in (a, b):
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    lines = log(folder, "a")
    assert [lines[0][0], *lines[0][2:]] == ["start", "2", "0"]
    assert lines[1][0] == "PeerFailure"
    assert lines[2] == ["start", "0", "1", "3"]
    assert lines[3] == ["end", *resumed(folder, tmp_path, 3, 1)]
    steps = [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")]
    assert steps == [1, 2, 3, 4, 5, 6]
