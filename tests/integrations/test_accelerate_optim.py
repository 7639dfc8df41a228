"""Accelerate with our optimizers under torchrun: prepare, accumulate, save on 2 and load on 3."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")

from tests.integrations.torchrun import Runs, run_torchrun, saved_by_two

MODULE = "tests.integrations.accelerate_run"
KINDS = ["plain", "sharded"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("accelerate")
    return saved_by_two(MODULE, KINDS, folder)


def test_it_trains_with_8_bit_states(two_ranks: Runs) -> None:
    for report in two_ranks.reports:
        for kind in KINDS:
            assert report[kind]["dtypes"] == ["torch.float32", "torch.uint8"]
            assert report[kind]["losses"][0] - report[kind]["later"][-1] > 0.01
            assert report[kind]["lr"] < 1e-2
            for key in ("losses", "saved", "later", "later_states"):
                assert report[kind][key] == two_ranks.reports[0]["plain"][key], (kind, key)


def test_the_same_ranks_resume_bit_for_bit(two_ranks: Runs) -> None:
    for report in two_ranks.reports:
        for kind in KINDS:
            again, before = report[f"{kind} again"], report[kind]
            assert again["loaded"] == before["saved"]
            for key in ("later", "later_states", "lr"):
                assert again[key] == before[key], (kind, key)


def test_more_ranks_load_the_same_states(two_ranks: Runs) -> None:
    before = two_ranks.reports[0]
    for report in run_torchrun(MODULE, 3, *KINDS, "resume", str(two_ranks.folder)):
        for kind in KINDS:
            assert report[kind]["loaded"] == before[kind]["saved"]
            assert report[kind]["later"] == pytest.approx(before[kind]["later"], rel=1e-5)
            assert report[kind]["dtypes"] == ["torch.float32", "torch.uint8"]
            assert report[kind]["lr"] == before[kind]["lr"]
