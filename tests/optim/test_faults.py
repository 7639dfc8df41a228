"""A rank dies or stops at any named point: the others are told in time, and a restart goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from feinwerk.distributed import list_checkpoints
from feinwerk.optim import PeerFailure, PhaseTimeout
from tests.optim.fault_ranks import Ending, run_to_the_end
from tests.optim.fault_training import SAVE_POINTS, STEP_POINTS, STEPS, Fault, Trained, train

# In which phases the others can be when a rank is gone at a point. They learn it where they wait.
_SEND = "reduce-scatter bucket "
PHASES = {
    "backward hook": (_SEND, "agree"),
    "between reduce-scatter and step": ("all-gather bucket ",),
    "in step": ("all-gather bucket ",),
    "before all-gather": ("all-gather bucket ",),
    "before write": ("save_checkpoint: write",),
    "after write": ("save_checkpoint: write",),
    "before rename": ("save_checkpoint: commit",),
    "after rename": ("save_checkpoint: commit",),
}
FULL = pytest.mark.full


def results(endings: list[Ending]) -> list[Trained]:
    for rank, ending in enumerate(endings):
        assert ending.error is None, f"rank {rank}: {ending.text}"
        assert (ending.signal, ending.stuck) == (None, False), f"rank {rank}: {ending}"
        assert ending.result.error is None, f"rank {rank}: {ending.result.error}"
    return [ending.result for ending in endings]


_uninterrupted: dict[Any, list[Trained]] = {}


def uninterrupted(folder: Path, world_size: int, options: dict[str, Any]) -> list[Trained]:
    """What a training without any fault comes to, on every rank."""
    key = world_size, str(options)
    if key not in _uninterrupted:
        endings = run_to_the_end(train, world_size, str(folder), None, 20.0, options)
        _uninterrupted[key] = results(endings)
    return _uninterrupted[key]


def check_survivors(endings: list[Ending], fault: Fault, timeout: float) -> None:
    expected = PeerFailure if fault.how == "die" else PhaseTimeout
    for rank, ending in enumerate(endings):
        if rank == fault.rank:
            assert ending.signal == (9 if fault.how == "die" else None), ending.text
            continue
        assert not ending.stuck, f"rank {rank} hangs"
        assert ending.error is None, ending.text
        error = ending.result.error
        assert isinstance(error, (PeerFailure, PhaseTimeout))
        assert error.phase.startswith(PHASES[fault.point]), error
        assert ending.result.waited < timeout + 5
        if not error.phase.startswith("save"):
            # A rank that lost its connection to another survivor, which had raised already, may
            # blame nobody; it blames no survivor.
            assert error.peers in ((fault.rank,), ()), error
        if len(endings) == 2 or fault.how == "stop":
            assert isinstance(error, expected), error
    survivors = [ending.result.error for ending in endings if ending.result is not None]
    assert any(isinstance(error, expected) for error in survivors)
    if not fault.point.endswith(("write", "rename")):
        assert any(error.peers == (fault.rank,) for error in survivors), survivors
    if fault.how == "stop":
        assert any(ending.result.waited >= timeout for ending in endings if ending.result)


def run_and_restart(
    tmp_path: Path, world_size: int, fault: Fault, options: dict[str, Any], timeout: float = 10.0
) -> None:
    truth = uninterrupted(tmp_path / "whole", world_size, options)
    folder = tmp_path / "broken"
    stopped = (fault.rank,) if fault.how == "stop" else ()
    endings = run_to_the_end(
        train, world_size, str(folder), fault, timeout, options, stopped=stopped
    )
    check_survivors(endings, fault, timeout)
    saved = [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")]
    assert saved == ([2, 4] if fault.point == "after rename" else [2])
    again = results(run_to_the_end(train, world_size, str(folder), None, 20.0, options))
    for rank, trained in enumerate(again):
        assert trained.first == saved[-1]
        assert trained.losses == truth[rank].losses[trained.first :], f"rank {rank}"
        assert trained.digest == truth[rank].digest, f"rank {rank}"
        assert len(trained.losses) == STEPS - trained.first


def faults(full: bool) -> list[Any]:
    """Points x victims; a save's writes are everybody's, its rename is rank 0's."""
    found = []
    for point in STEP_POINTS:
        for count in (1, 2):
            found += [(Fault(rank, 3, point, count), count == 2 and rank == 1) for rank in range(3)]
    for point in SAVE_POINTS:
        ranks = range(3) if point.endswith("write") else range(1)
        found += [(Fault(rank, 4, point), rank in (0, 2)) for rank in ranks]
    return [
        pytest.param(fault, id=f"{fault.point} {fault.count} rank {fault.rank}",
                     marks=[] if quick else FULL)
        for fault, quick in found if full or quick
    ]  # fmt: skip


@pytest.mark.parametrize("fault", faults(full=True))
def test_a_killed_rank(fault: Fault, tmp_path: Path) -> None:
    run_and_restart(tmp_path, 3, fault, {})


@pytest.mark.parametrize("fault", faults(full=False))
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"stage": 1}, marks=FULL),
        pytest.param({"overlap": False, "bucket_mb": 25}, marks=FULL),
        pytest.param(
            {"offload": "disk", "offload_directory": "", "offload_fsync": False}, marks=FULL
        ),
        pytest.param({"state_bits": 32}, marks=FULL),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_killed_rank_in_other_ways_to_train(
    fault: Fault, options: dict[str, Any], tmp_path: Path
) -> None:
    if options.get("bucket_mb") == 25 and fault.count > 1 and fault.point != "backward hook":
        fault = fault._replace(count=1)  # there is one bucket
    run_and_restart(tmp_path, 3, fault, options)


def test_a_killed_rank_with_states_on_disk(tmp_path: Path) -> None:
    options = {"offload": "disk", "offload_directory": "", "offload_fsync": False}
    run_and_restart(tmp_path, 2, Fault(1, 3, "in step", 2), options)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(1, 3, "backward hook", 2, "stop"),
        Fault(0, 3, "before all-gather", 1, "stop"),
        Fault(1, 4, "before write", 1, "stop"),
        pytest.param(Fault(0, 3, "between reduce-scatter and step", 1, "stop"), marks=FULL),
        pytest.param(Fault(1, 3, "in step", 3, "stop"), marks=FULL),
        pytest.param(Fault(0, 4, "after write", 1, "stop"), marks=FULL),
        pytest.param(Fault(0, 4, "before rename", 1, "stop"), marks=FULL),
        pytest.param(Fault(2, 3, "in step", 1, "stop"), marks=FULL),
    ],
    ids=lambda fault: f"{fault.point} rank {fault.rank}",
)
def test_a_stopped_rank(fault: Fault, tmp_path: Path) -> None:
    run_and_restart(tmp_path, max(2, fault.rank + 1), fault, {}, timeout=1.5)
