"""What is saved by one process is loaded again to the bit, listed, kept and described."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk.distributed import (
    CheckpointError,
    MismatchedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)
from feinwerk.distributed.checkpoint import values
from feinwerk.distributed.checkpoint.names import canonical
from feinwerk.nn import NF4Linear, add_adapters, quantize_model
from feinwerk.optim import AdamW
from tests.distributed.checkpoint_cases import (
    OPTIONS,
    contents,
    digest,
    file_bytes,
    tiny_model,
    tiny_optimizer,
    train,
)

FORMATS: list[dict[str, Any]] = [
    {"state_bits": 8},
    {"state_bits": 16},
    {"state_bits": 32},
    {"state_bits": 8, "layout": "flat"},
    {"state_bits": 8, "bf16_params": "stochastic"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", FORMATS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_new_optimizer_goes_on_as_the_old_one(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = tiny_model(dtype=dtype)
    optimizer = tiny_optimizer(model, **options)
    train(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, 3, model, optimizer)
    again = tiny_model(dtype=dtype)
    other = tiny_optimizer(again, **options)
    loaded = load_latest(tmp_path, again, other)
    assert loaded is not None
    assert (loaded.step, loaded.world_size, loaded.engine) == (3, 1, "plain")
    assert digest(again, other) == digest(model, optimizer)
    train(model, optimizer, 3, 3)
    train(again, other, 3, 3)
    assert digest(again, other) == digest(model, optimizer)


def test_an_optimizer_with_states_keeps_their_tensors(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer, 0, 2)
    save_checkpoint(tmp_path, 2, model, optimizer)
    expected = digest(model, optimizer)
    states = {id(t) for state in optimizer.state.values() for t in state.values()}
    train(model, optimizer, 2, 2)
    load_latest(tmp_path, model, optimizer)
    assert digest(model, optimizer) == expected
    assert {id(t) for s in optimizer.state.values() for t in s.values()} == states


def test_before_the_first_step_and_without_gradients(tmp_path: Path) -> None:
    """A parameter that never had a gradient has no state; loading makes that so again."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    save_checkpoint(tmp_path, 0, model, optimizer)
    expected = digest(model, optimizer)
    train(model, optimizer, 0, 1)
    assert len(optimizer.state) == 2
    load_latest(tmp_path, model, optimizer)
    assert not optimizer.state
    assert digest(model, optimizer) == expected


def test_options_and_scheduler_come_back(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, AdamW, Any]:
        model = tiny_model()
        optimizer = AdamW(
            [{"params": [model[0].weight], "weight_decay": 0.0}, {"params": [model[0].bias]}],
            **OPTIONS,
        )
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], 0.5),
        ]
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [2])
        return model, optimizer, both

    def go_on(model: nn.Module, optimizer: AdamW, scheduler: Any, first: int) -> list[float]:
        rates = []
        for step in range(first, first + 4):
            train(model, optimizer, step, 1)
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    model, optimizer, scheduler = make()
    go_on(model, optimizer, scheduler, 0)
    optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    save_checkpoint(tmp_path, 4, model, optimizer, scheduler=scheduler)
    again, other, rates = make()
    with pytest.raises(MismatchedCheckpoint, match=r"unexpected.*the state of a scheduler"):
        load_latest(tmp_path, again, other)
    load_latest(tmp_path, again, other, scheduler=rates)
    assert other.param_groups[0]["weight_decay"] == 0.0
    assert other.param_groups[1]["betas"] == (0.5, 0.6)
    assert go_on(again, other, rates, 4) == go_on(model, optimizer, scheduler, 4)
    assert digest(again, other) == digest(model, optimizer)
    save_checkpoint(tmp_path, 8, model, optimizer)
    with pytest.raises(MismatchedCheckpoint, match=r"missing.*the state of a scheduler"):
        load_latest(tmp_path, again, other, scheduler=rates)


def test_a_tensor_learning_rate_stays_the_same_tensor(tmp_path: Path) -> None:
    model = tiny_model()
    rate = torch.tensor(0.25)
    optimizer = tiny_optimizer(model, lr=rate)
    save_checkpoint(tmp_path, 0, model, optimizer)
    rate.fill_(0.5)
    load_latest(tmp_path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_other_optimizers(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 0, 2)
    save_checkpoint(tmp_path, 2, model, optimizer)
    again = tiny_model()
    other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    load_latest(tmp_path, again, other)
    train(model, optimizer, 2, 2)
    train(again, other, 2, 2)
    assert digest(again, other) == digest(model, optimizer)


def test_extra_values(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    extra = {
        "epoch": 3, "position": (1, 2.5), "best": math.inf, "text": "für", 7: [None, True],
        "$odd": Counter({2: 3}), "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }  # fmt: skip
    save_checkpoint(tmp_path, 1, model, optimizer, extra=extra, rank_extra=torch.get_rng_state())
    expected = torch.rand(3)
    loaded = load_latest(tmp_path, model, optimizer)
    assert loaded is not None
    torch.set_rng_state(loaded.rank_extra)
    assert torch.equal(torch.rand(3), expected)
    tensors = ("bf16", "empty")
    for name in tensors:
        assert loaded.extra[name].dtype == extra[name].dtype
        assert torch.equal(loaded.extra[name], extra[name])
    rest = {key: value for key, value in extra.items() if key not in tensors}
    assert {key: value for key, value in loaded.extra.items() if key not in tensors} == rest
    assert type(loaded.extra["$odd"]) is Counter
    with pytest.raises(TypeError, match=r"save_checkpoint: extra\['a'\]\[1\] must be made of"):
        save_checkpoint(tmp_path, 2, model, optimizer, extra={"a": [0, object()]})
    assert math.isnan(values.decode(json.loads(json.dumps(values.encode("", "", math.nan)))))


def test_trainable_leaves_the_base_out_and_keeps_running_statistics(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        quantize_model(model, skip=())
        add_adapters(model, 2, lora_alpha=2)
        model[0].lora_B.data.normal_()
        return model, AdamW([p for p in model.parameters() if p.requires_grad], **OPTIONS)

    model, optimizer = make()
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, model, optimizer)
    names = set(json.loads((path / "manifest.json").read_text())["tensors"])
    stored = {name for name in names if name.startswith("model.")}
    assert stored == {
        "model.0.lora_A", "model.0.lora_B", "model.2.lora_A", "model.2.lora_B",
        "model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked",
    }  # fmt: skip
    again, other = make()
    load_latest(tmp_path, again, other)
    assert digest(again, other) == digest(model, optimizer)
    assert torch.equal(again[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("double_quant", [True, False])
def test_all_has_the_nf4_base_as_well(tmp_path: Path, double_quant: bool) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = NF4Linear.from_linear(nn.Linear(64, 16), double_quant=double_quant)
        return nn.Sequential(layer, nn.BatchNorm1d(16), nn.Linear(16, 3))

    model, again = make(0), make(1)
    optimizer, other = (AdamW(m[2].parameters(), **OPTIONS) for m in (model, again))
    path = save_checkpoint(tmp_path, 1, model, optimizer, parameters="all")
    load_checkpoint(path, again, other)
    for (name, ours), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model[0].dequantize(), again[0].dequantize())


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embedding.weight

    for parameters in ("trainable", "all"):
        model, again = Tied(), Tied()
        optimizer, other = (AdamW(m.parameters(), **OPTIONS) for m in (model, again))
        path = save_checkpoint(tmp_path / parameters, 1, model, optimizer, parameters=parameters)
        assert list(json.loads((path / "manifest.json").read_text())["tensors"]) == [
            "model.embedding.weight"
        ]
        load_checkpoint(path, again, other)
        assert torch.equal(again.head.weight, model.head.weight)
        assert again.head.weight is again.embedding.weight


def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    bare = tiny_model()
    wrapped = torch.compile(nn.DataParallel(tiny_model(seed=1)), backend="eager")
    optimizer = tiny_optimizer(bare)
    train(bare, optimizer, 0, 1)
    save_checkpoint(tmp_path, 1, bare, optimizer, parameters="all")
    load_latest(tmp_path, wrapped, tiny_optimizer(wrapped))
    assert torch.equal(wrapped._orig_mod.module[0].weight, bare[0].weight)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert canonical(Own(), "module.weight") == "module.weight"
    assert canonical(nn.DataParallel(Own()), "module.module.weight") == "module.weight"


def test_steps_are_listed_and_the_latest_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    assert list_checkpoints(tmp_path / "none") == []
    assert load_latest(tmp_path / "none", model, optimizer) is None

    def steps() -> list[int]:
        return [checkpoint.step for checkpoint in list_checkpoints(tmp_path)]

    for step in (9, 10, 11, 100):
        path = save_checkpoint(tmp_path, step, model, optimizer, keep=3)
        assert path == tmp_path / f"step-{step}"
    assert steps() == [10, 11, 100]
    (tmp_path / "step-7").mkdir()  # without a manifest
    (tmp_path / "step-012").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save_checkpoint(tmp_path, 101, model, optimizer, keep=None)
    assert steps() == [10, 11, 100, 101]
    save_checkpoint(tmp_path, 5, model, optimizer, keep=1)
    assert steps() == [5, 101]  # the one that was just written is never removed
    assert {"step-7", "step-012", "notes.txt"} <= {p.name for p in tmp_path.iterdir()}


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    save_checkpoint(tmp_path, 1, model, optimizer)
    before = file_bytes(tmp_path)
    train(model, optimizer, 0, 1)
    with pytest.raises(CheckpointError, match=r"step must be new, got 1: .*step-1 exists"):
        save_checkpoint(tmp_path, 1, model, optimizer)
    assert file_bytes(tmp_path) == before


def test_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer, 0, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer)
    again = tiny_model()
    load_checkpoint(path, again, None)
    assert torch.equal(again[0].weight, model[0].weight)


def test_dcp_s_own_tool_reads_it(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer, 0, 2)
    path = save_checkpoint(tmp_path, 2, model, optimizer, parameters="all")
    out = tmp_path / "whole.pt"
    command = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    subprocess.run([*command, str(path), str(out)], check=True, timeout=120, capture_output=True)
    whole = torch.load(out, weights_only=True)
    assert set(whole) == {"model", "optimizer"}
    found = {f"model.{name}": tensor for name, tensor in whole["model"].items()}
    for name, state in whole["optimizer"].items():
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    expected = contents(model, optimizer)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert str(tmp_path).encode() not in (path / ".metadata").read_bytes()


def test_files_hold_nothing_but_the_tensors(tmp_path: Path) -> None:
    """A view of a large buffer is stored as what it shows."""
    model = tiny_model()
    large = torch.zeros(1000, 12)
    large[:7] = model[0].weight.data
    model[0].weight.data = large[:7]
    path = save_checkpoint(tmp_path, 1, model, tiny_optimizer(model))
    assert (path / "__0_0.distcp").stat().st_size < 8000
    again = tiny_model(seed=2)
    load_checkpoint(path, again, None)
    assert torch.equal(again[0].weight, model[0].weight)
    model[0].weight.data = torch.arange(84.0).reshape(12, 7).T  # not contiguous
    path = save_checkpoint(tmp_path, 2, model, tiny_optimizer(model))
    load_checkpoint(path, again, None)
    assert torch.equal(again[0].weight, model[0].weight)
    assert verify_checkpoint(path) == []
