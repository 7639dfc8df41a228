"""Universal checkpoint folders from and into our optimizers; DeepSpeed is needed by none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import optim
from feinwerk.distributed import CheckpointError, MismatchedCheckpoint
from feinwerk.integrations.deepspeed import export_universal, import_universal
from feinwerk.optim.moments import dequantize_moment, quantize_moment
from feinwerk.testing import assert_same_bits
from tests.integrations import universal_ranks
from tests.optim.processes import run_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(70, 65), nn.Tanh(), nn.Linear(65, 65), nn.Linear(65, 7))
    model[2].requires_grad_(False)
    return model.to(dtype)


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "torch":
        return torch.optim.AdamW(trained, lr=1e-2)
    return optim.AdamW(trained, lr=1e-2, state_bits=int(kind))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int = 3) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 70, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def moment_of(state: dict[str, Any], moment: str) -> torch.Tensor:
    if moment in state:
        return state[moment].float()
    return dequantize_moment(moment, state[f"{moment}_codes"], state[f"{moment}_absmax"])


def equal_states(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for state, same in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert set(state) == set(same)
        for key, value in state.items():
            assert_same_bits(value, same[key], key)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("32", torch.float32), ("16", torch.float32), ("torch", torch.float32),
        ("32", torch.bfloat16), ("16", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_training_goes_on_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(dtype)
    optimizer = make_optimizer(kind, model)
    train(model, optimizer, 0)
    assert export_universal(model, optimizer, tmp_path / "u") == tmp_path / "u"

    again = make_model(dtype, seed=1)
    again[2].load_state_dict(model[2].state_dict())
    resumed = make_optimizer(kind, again)
    assert import_universal(tmp_path / "u", again, resumed) == 3
    equal_states(resumed, optimizer)
    for trained, others in ((model, optimizer), (again, resumed)):
        train(trained, others, 3)
    for name, parameter in model.named_parameters():
        assert_same_bits(again.get_parameter(name).detach(), parameter.detach(), name)


def test_8_bits_are_exact_in_the_folder_and_quantized_from_it(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("8", model)
    train(model, optimizer, 0)
    export_universal(model, optimizer, tmp_path / "u")
    weight = model[0].weight
    for moment in MOMENTS:
        stored = torch.load(tmp_path / "u" / "zero" / "0.weight" / f"{moment}.pt")["param"]
        assert_same_bits(stored, moment_of(optimizer.state[weight], moment))
    again = make_model(seed=1)
    resumed = make_optimizer("8", again)
    import_universal(tmp_path / "u", again, resumed)
    assert_same_bits(again[0].weight.detach(), weight.detach())
    state = resumed.state[again[0].weight]
    for moment in MOMENTS:
        values = moment_of(optimizer.state[weight], moment)
        codes, absmax = quantize_moment(moment, values)
        assert_same_bits(state[f"{moment}_codes"], codes)
        assert_same_bits(state[f"{moment}_absmax"], absmax)
    # The bias is no matrix and keeps fp32 moments.
    assert_same_bits(
        resumed.state[again[0].bias]["exp_avg"], optimizer.state[model[0].bias]["exp_avg"]
    )


def test_widths_and_options_are_the_loading_optimizer_s(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("32", model)
    train(model, optimizer, 0)
    export_universal(model, optimizer, tmp_path / "u")
    again = make_model(torch.bfloat16, seed=1)
    trained = [p for p in again.parameters() if p.requires_grad]
    resumed = optim.AdamW(trained, lr=0.5, blocksize=64, bf16_params="stochastic")
    import_universal(tmp_path / "u", again, resumed)
    assert resumed.param_groups[0]["lr"] == 0.5
    state = resumed.state[again[0].weight]
    assert state["exp_avg_absmax"].shape == (65, 2)
    assert_same_bits(again[0].weight.detach(), model[0].weight.detach().bfloat16())


def test_stage_3_folders_have_flat_tensors_and_may_lack_the_step(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("32", model)
    train(model, optimizer, 0)
    folder = export_universal(model, optimizer, tmp_path / "u")
    for file in folder.glob("zero/*/*.pt"):
        if file.name == "step.pt":
            file.unlink()
        else:
            torch.save(torch.load(file)["param"].flatten(), file)
    again = make_model(seed=1)
    resumed = make_optimizer("32", again)
    before = again[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"has no step.pt .* pass steps="):
        import_universal(folder, again, resumed)
    assert_same_bits(again[0].weight.detach(), before)
    assert import_universal(folder, again, resumed, steps=3) == 3
    equal_states(resumed, optimizer)


def test_a_parameter_without_a_step_has_no_state(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("8", model)
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = export_universal(model, optimizer, tmp_path / "u", global_steps=7)
    assert not (folder / "zero" / "3.weight" / "exp_avg.pt").exists()
    counters = torch.load(folder / "mp_rank_00_model_states.pt")
    assert counters["global_steps"] == 7
    again = make_model(seed=1)
    resumed = make_optimizer("8", again)
    train(again, resumed, 0)
    import_universal(folder, again, resumed)
    assert again[3].weight not in resumed.state
    assert_same_bits(again[3].weight.detach(), model[3].weight.detach())


def test_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("8", model)
    train(model, optimizer, 0)
    folder = export_universal(model, optimizer, tmp_path / "u")
    other = nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(65, 65))
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    resumed = optim.AdamW(other.parameters())
    with pytest.raises(MismatchedCheckpoint) as error:
        import_universal(folder, other, resumed)
    assert error.value.missing == ("2.bias", "2.weight")
    assert error.value.unexpected == ("3.bias", "3.weight")
    assert error.value.different == (
        "0.bias has shape [65] in the checkpoint and [64] here",
        "0.weight has shape [65, 70] in the checkpoint and [64, 70] here",
    )
    for name, parameter in other.named_parameters():
        assert_same_bits(parameter.detach(), before[name], name)
    assert not resumed.state


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer("8", model)
    train(model, optimizer, 0)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="folder must not exist"):
        export_universal(model, optimizer, tmp_path / "there")
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, 0)
    with pytest.raises(CheckpointError, match=r"state of 0.weight must be one of AdamW's"):
        export_universal(model, sgd, tmp_path / "sgd")
    with pytest.raises(CheckpointError, match="no universal checkpoint in"):
        import_universal(tmp_path / "sgd", model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = make_optimizer("8", model)
    train(model, optimizer, 0)
    save, count = torch.save, 0

    def full(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_universal(model, optimizer, tmp_path / "u")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)],
    ids=str,
)
def test_every_engine_writes_the_same_and_reads_it_at_any_world_size(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    written = run_ranks(universal_ranks.export_all, 2, str(tmp_path), dtype, timeout=180)
    engines = universal_ranks.ENGINES
    for report in written:
        for engine in engines:
            same_content(report[engine], written[0]["plain"], engine)
    for file in sorted((tmp_path / "plain" / "zero").glob("*/*.pt")):
        for engine in engines[1:]:
            other = tmp_path / engine / "zero" / file.parent.name / file.name
            ours, theirs = torch.load(file), torch.load(other)
            if file.name != "step.pt":
                ours, theirs = ours["param"], theirs["param"]
            assert_same_bits(theirs, ours, f"{engine} {file.parent.name}/{file.name}")
    read = run_ranks(universal_ranks.import_all, 4, str(tmp_path), dtype, "fsdp2", timeout=180)
    for report in read:
        for engine in engines:
            same_content(report[engine], read[0]["plain"], engine)
            same_content(report[f"{engine} later"], read[0]["plain later"], f"{engine} later")
    for name, value in read[0]["plain"].items():
        if "codes" not in name and "absmax" not in name:
            assert_same_bits(value, written[0]["plain"][name], name)


def same_content(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert set(ours) == set(theirs), what
    for name, value in ours.items():
        assert_same_bits(value, theirs[name], f"{what} {name}")
