"""Our AdamW as client optimizer of DeepSpeed: ZeRO 1, 2 and 3 on CPU and gloo, for real."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk import optim
from feinwerk.integrations.deepspeed import export_universal, import_universal, to_universal
from feinwerk.optim.moments import dequantize_moment
from feinwerk.testing import assert_same_bits
from tests.integrations import deepspeed_ranks as ranks
from tests.optim.processes import run_ranks

pytest.importorskip("deepspeed")

QUICK = [("1", "8"), ("2", "8"), ("3", "8"), ("1", "32"), ("3", "32"), ("2-bf16", "8")]
FULL = [(name, kind) for name in ranks.ENGINES for kind in ("8", "16", "32", "torch")]
MOMENTS = ("exp_avg", "exp_avg_sq")
Report = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Runs:
    """What two ranks have trained and saved."""

    folder: Path
    cases: list[tuple[str, str]]
    reports: list[Report]

    def of(self, *kinds: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(name, report of each rank) of the cases with these kinds of optimizer."""
        for name, kind in self.cases:
            if kind in kinds:
                yield name, [report[f"{name}-{kind}"] for report in self.reports]


@pytest.fixture(scope="module", params=["quick", pytest.param("full", marks=pytest.mark.full)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = QUICK if request.param == "quick" else FULL
    folder = tmp_path_factory.mktemp("zero")
    timeout = 60 + 10 * len(cases)
    return Runs(
        folder,
        cases,
        run_ranks(ranks.train_and_save, 2, str(folder), cases, timeout=timeout),
    )


def test_every_partition_is_quantized(runs: Runs) -> None:
    for name, reports in runs.of("8"):
        partitions = 3 if name == "3" else 2
        for report in reports:
            assert len(report["states"]) == partitions, name
            for size, state in zip(report["sizes"], report["states"], strict=True):
                blocks = -(-size // 256)
                assert size % 256, "a size that is no multiple of the block, or this tests little"
                keys = {f"{moment}_{part}" for moment in MOMENTS for part in ("codes", "absmax")}
                assert set(state) == {"step", *keys}, name
                for moment in MOMENTS:
                    assert state[f"{moment}_codes"].dtype is torch.uint8
                    assert state[f"{moment}_codes"].unique().numel() > 10
                    assert (state[f"{moment}_absmax"] > 0).all()
                held = sum(t.numel() * t.element_size() for t in state.values())
                assert held == 2 * size + 8 * blocks + 4, name
                assert state["step"] == ranks.STEPS


def test_32_bits_are_the_plain_run_bit_for_bit(runs: Runs) -> None:
    model, _ = ranks.plain_run(32, parts=2, steps=ranks.STEPS)
    later, _ = ranks.plain_run(32, parts=2, steps=2 * ranks.STEPS)
    for name, reports in runs.of("32"):
        if name in ("2-bf16", "2-clip"):
            continue  # other gradients
        for report in reports:
            for key, expected in (("parameters", model), ("later_parameters", later)):
                masters = ranks.masters_of(expected)
                assert set(report[key]) == set(masters)
                for parameter, value in report[key].items():
                    assert_same_bits(value, masters[parameter], f"{name} {parameter}")


def test_8_bits_train_as_32_do(runs: Runs) -> None:
    model, optimizer = ranks.plain_run(32, parts=2, steps=0)
    plain = ranks.train_plainly(model, optimizer, 0, 2, 2 * ranks.STEPS)
    for name, reports in runs.of("8"):
        losses = reports[0]["losses"] + reports[0]["later"]
        assert losses[0] != losses[-1]
        tolerance = 0.01 if name != "2-clip" else 0.03
        assert losses == pytest.approx(plain, rel=tolerance), name


@pytest.mark.full
@pytest.mark.parametrize("runs", ["full"], indirect=True)
def test_every_width_follows_torch_in_the_same_engine(runs: Runs) -> None:
    expected = dict(runs.of("torch"))
    for kind, tolerance in (("32", 2e-6), ("16", 1e-3), ("8", 1e-3)):
        for name, reports in runs.of(kind):
            for ours, theirs in zip(reports, expected[name], strict=True):
                losses = ours["losses"] + ours["later"]
                assert losses == pytest.approx(theirs["losses"] + theirs["later"], rel=tolerance), (
                    f"{name} {kind}"
                )


def test_resuming_at_the_same_world_size_is_bit_identical(runs: Runs) -> None:
    loads = [(f"{name}-{kind}", name, kind) for name, kind in runs.cases]
    timeout = 60 + 10 * len(loads)
    export_plain_run(runs.folder / "universal-plain")
    others = [("1-8", "1", "32"), ("universal-plain", "1", "32"), ("universal-plain", "3", "32")]
    resumed = run_ranks(ranks.resume, 2, str(runs.folder), [*loads, *others], timeout=timeout)
    for report in resumed:
        said = report["1-8 in 1-32"]["error"]
        assert "state_bits of group 0 in state_dict must be 32 as in this optimizer, got 8" in said
        check_plain_run_goes_on(report["universal-plain in 1-32"])
        check_plain_run_goes_on(report["universal-plain in 3-32"])
    for checkpoint, name, kind in loads:
        for ours, before in zip(resumed, runs.reports, strict=True):
            report, expected = ours[f"{checkpoint} in {name}-{kind}"], before[checkpoint]
            assert report["global_steps"] == ranks.STEPS
            assert report["later"] == expected["later"], checkpoint
            for key in ("states", "later_states"):
                for state, same in zip(report[key], expected[key], strict=True):
                    assert set(state) == set(same)
                    for entry, tensor in state.items():
                        assert_same_bits(tensor, same[entry], f"{checkpoint} {entry}")
            for key in ("parameters", "later_parameters"):
                for parameter, tensor in report[key].items():
                    assert_same_bits(tensor, expected[key][parameter], f"{checkpoint} {parameter}")


def export_plain_run(folder: Path) -> None:
    model, optimizer = ranks.plain_run(32, parts=2, steps=ranks.STEPS)
    export_universal(model, optimizer, folder)


def check_plain_run_goes_on(report: dict[str, Any]) -> None:
    """Two ranks of DeepSpeed have taken over what one process without it had begun."""
    assert report["global_steps"] == ranks.STEPS
    for key, steps in (("parameters", ranks.STEPS), ("later_parameters", 2 * ranks.STEPS)):
        model, _ = ranks.plain_run(32, parts=2, steps=steps)
        for name, master in ranks.masters_of(model).items():
            assert_same_bits(report[key][name], master, f"{key} {name}")


def check_one_process_goes_on(folder: Path) -> None:
    """One process without DeepSpeed takes over what two ranks had begun."""
    model = ranks.make_model()
    optimizer = optim.AdamW(ranks.groups_of(model), lr=ranks.LR, state_bits=32)
    assert import_universal(folder, model, optimizer) == ranks.STEPS
    expected, _ = ranks.plain_run(32, parts=2, steps=ranks.STEPS)
    for name, master in ranks.masters_of(expected).items():
        assert_same_bits(model.get_parameter(name).detach(), master, name)
    ranks.train_plainly(model, optimizer, ranks.STEPS, parts=2)
    expected, _ = ranks.plain_run(32, parts=2, steps=2 * ranks.STEPS)
    for name, master in ranks.masters_of(expected).items():
        assert_same_bits(model.get_parameter(name).detach(), master, name)


def whole_moments(reports: list[dict[str, Any]], moment: str) -> torch.Tensor:
    """A moment of the matrices as stage 1 and 2 lay it out: partition after partition."""
    parts = []
    for report in reports:
        state = report["states"][0]
        if moment in state:
            parts.append(state[moment])
        else:
            codes, absmax = state[f"{moment}_codes"], state[f"{moment}_absmax"]
            parts.append(dequantize_moment(moment, codes, absmax))
    return torch.cat(parts)


def mean_losses(reports: list[dict[str, Any]]) -> list[float]:
    """Over the ranks, step by step."""
    return [statistics.fmean(r["later"][step] for r in reports) for step in range(ranks.STEPS)]


def test_universal_checkpoints_go_to_another_world_size(runs: Runs) -> None:
    loads = []
    for name, kind in runs.cases:
        if kind == "torch":
            continue
        out = runs.folder / f"universal-{name}-{kind}"
        if kind == "8":
            with pytest.warns(UserWarning, match="8-bit moments are stored as fp32"):
                assert to_universal(runs.folder / f"{name}-{kind}", out) == out
        else:
            to_universal(runs.folder / f"{name}-{kind}", out)
        loads.append((out.name, name, kind))
    assert (runs.folder / "latest_universal").read_text() == loads[-1][0]
    assert not list(runs.folder.glob(".*")), "nothing is left behind"
    for name in ("1", "3"):
        check_one_process_goes_on(runs.folder / f"universal-{name}-32")
    # Another stage, and back from 8 bits to 32.
    loads += [("universal-1-8", "3", "8"), ("universal-3-8", "2", "32")]
    timeout = 90 + 15 * len(loads)
    direct = ("1-8", "1", "8")
    resumed = run_ranks(ranks.resume, 3, str(runs.folder), [direct, *loads], timeout=timeout)
    for report in resumed:
        said = report["1-8 in 1-8"]["error"]
        assert "DP world size of 2 but the current world size is 3" in said
    for checkpoint, name, kind in loads:
        reports = [report[f"{checkpoint} in {name}-{kind}"] for report in resumed]
        origin = [report[checkpoint.removeprefix("universal-")] for report in runs.reports]
        what = f"{checkpoint} in {name}-{kind}"
        for report in reports:
            assert report["global_steps"] == ranks.STEPS
            for parameter, tensor in report["parameters"].items():
                assert_same_bits(tensor, origin[0]["parameters"][parameter], f"{what} {parameter}")
            for state in report["later_states"]:
                assert state["step"] == 2 * ranks.STEPS, what
                assert ("exp_avg_codes" in state) == (kind == "8"), what
            if kind == "8":
                # What DeepSpeed keeps to read states by parameter must not keep the fp32 ones.
                assert not report["linked"] & set(MOMENTS), what
        if name[0] in "12" and checkpoint[10] in "12" and kind in ("8", "32"):
            for moment in MOMENTS:
                before = whole_moments(origin, moment)
                after = whole_moments(reports, moment)
                size = min(before.numel(), after.numel())
                assert_same_bits(after[:size], before[:size], f"{what} {moment}")
                assert not before[size:].any(), "padding"
        mean, expected = mean_losses(reports), mean_losses(origin)
        # Gradients are summed in another order; 8-bit moments are rounded once more.
        bf16 = "bf16" in what
        tolerance = 1e-3 if kind != "32" or bf16 or "-8" in checkpoint else 1e-6
        assert mean == pytest.approx(expected, rel=tolerance), what


@pytest.mark.parametrize("runs", ["quick"], indirect=True)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(runs.folder / "1-8", source)
    out = tmp_path / "out" / "universal"
    with pytest.raises(FileNotFoundError, match="no checkpoint other in"):
        to_universal(source, out, tag="other")
    with pytest.raises(FileExistsError, match="out_dir must not exist"):
        to_universal(source, source)
    shard = source / "saved" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(shard, weights_only=False)
    states = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
    states[0] = {"step": states[0]["step"], "state1": torch.ones(4), "state2": torch.ones(4)}
    torch.save(content, shard)
    with pytest.raises(ValueError, match=r"must be one of AdamW's: .* got step, state1, state2"):
        to_universal(source, out)
    for stage in "13":
        broken = tmp_path / f"broken-{stage}"
        shutil.copytree(runs.folder / f"{stage}-32", broken)
        (broken / "saved" / shard.name).unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks the .* of ranks \[1\] of 2"):
            to_universal(broken, out)
    for file in (source / "saved").glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*_optim_states\.pt in"):
        to_universal(source, out)
    (source / "latest").unlink()
    with pytest.raises(FileNotFoundError, match="tag must be given"):
        to_universal(source, out)
    assert not list(out.parent.iterdir())
