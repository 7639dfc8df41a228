"""The Trainer of transformers with our optimizers: alone, under torchrun, resumed on more ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from feinwerk.distributed import CheckpointError
from tests.integrations import trainer_run
from tests.integrations.torchrun import Runs, run_torchrun, saved_by_two

SAVED, LAST = trainer_run.SAVED, trainer_run.LAST
KINDS = ["plain", "sharded"]
MODULE = "tests.integrations.trainer_run"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("trainer")
    return saved_by_two(MODULE, KINDS, folder)


def check_weights(report: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert set(report["weights"]) == set(expected["weights"])
    for name, total in report["weights"].items():
        assert total == pytest.approx(expected["weights"][name], abs=tolerance), name


def test_it_trains_and_8_bit_states_are_saved(two_ranks: Runs) -> None:
    for report in two_ranks.reports:
        for kind in KINDS:
            losses = report[kind]["losses"]
            assert len(losses) == LAST or not losses  # rank 0 alone logs
            if losses:
                assert losses[-1] < losses[0] - 0.1
            assert report[kind]["global_step"] == LAST
            assert report[kind]["digests"] == two_ranks.reports[0][kind]["digests"]


def test_sharded_states_give_the_same_training_with_half_the_bytes(two_ranks: Runs) -> None:
    first = two_ranks.reports[0]
    assert first["sharded"]["losses"] == first["plain"]["losses"]
    assert first["sharded"]["weights"] == first["plain"]["weights"]
    assert first["sharded"]["digests"] == first["plain"]["digests"]
    for report in two_ranks.reports:
        ratio = report["sharded"]["state_bytes"] / report["plain"]["state_bytes"]
        assert ratio == pytest.approx(0.5, abs=0.01)


def test_the_same_ranks_resume_bit_for_bit(two_ranks: Runs) -> None:
    for report in two_ranks.reports:
        for kind in KINDS:
            again, before = report[f"{kind} again"], report[kind]
            assert again["digests"]["loaded"] == before["digests"][f"saved {SAVED}"]
            assert again["losses"] == before["losses"][SAVED:]
            assert again["digests"][f"saved {LAST}"] == before["digests"][f"saved {LAST}"]
            assert again["weights"] == before["weights"]


def test_more_ranks_resume_with_the_same_states(two_ranks: Runs, tmp_path: Path) -> None:
    shutil.copytree(two_ranks.folder, tmp_path, dirs_exist_ok=True)
    three = run_torchrun(MODULE, 3, *KINDS, "resume", str(tmp_path))
    before = two_ranks.reports[0]
    for report in three:
        for kind in KINDS:
            assert report[kind]["digests"]["loaded"] == before[kind]["digests"][f"saved {SAVED}"]
            check_weights(report[kind], before[kind], 1e-4)
    for kind in KINDS:
        assert three[0][kind]["losses"] == pytest.approx(before[kind]["losses"][SAVED:], rel=1e-5)
    parts = [report["sharded"]["state_bytes"] for report in three]
    assert max(parts) < 0.4 * three[0]["plain"]["state_bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_what_two_ranks_have_saved(
    kind: str, two_ranks: Runs, tmp_path: Path
) -> None:
    shutil.copytree(two_ranks.folder, tmp_path, dirs_exist_ok=True)
    report = trainer_run.train(tmp_path, kind, resume=True)
    before = two_ranks.reports[0][kind]
    assert report["digests"]["loaded"] == before["digests"][f"saved {SAVED}"]
    assert report["losses"] == pytest.approx(before["losses"][SAVED:], rel=1e-5)
    check_weights(report, before, 1e-4)


def test_sharded_states_that_are_not_there_are_an_error(two_ranks: Runs, tmp_path: Path) -> None:
    checkpoint = two_ranks.folder / "sharded" / f"checkpoint-{SAVED}"
    assert not (checkpoint / "optimizer.pt").exists(), "the states of one rank must not be loaded"
    assert (checkpoint / "feinwerk" / f"step-{SAVED}").is_dir()
    shutil.copytree(checkpoint, tmp_path / "sharded" / checkpoint.name)
    shutil.rmtree(tmp_path / "sharded" / checkpoint.name / "feinwerk")
    with pytest.raises(CheckpointError, match=r"must hold step 3, got nothing \(pass resume_from="):
        trainer_run.train(tmp_path, "sharded", resume=True)


def test_a_checkpoint_of_another_run_is_named(two_ranks: Runs, tmp_path: Path) -> None:
    report = trainer_run.train(
        tmp_path, "sharded", resume=True, checkpoints=two_ranks.folder / "sharded"
    )
    before = two_ranks.reports[0]["sharded"]
    assert report["digests"]["loaded"] == before["digests"][f"saved {SAVED}"]
    assert (tmp_path / "sharded" / f"checkpoint-{LAST}" / "feinwerk" / f"step-{LAST}").is_dir()
