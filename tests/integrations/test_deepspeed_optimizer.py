"""The client optimizer for DeepSpeed, and what a configuration must say; without DeepSpeed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk import optim
from feinwerk.integrations.deepspeed import AdamW, check_config, complete_config
from feinwerk.optim.moments import quantize_moment
from feinwerk.testing import assert_same_bits


def partition_of(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).requires_grad_()


@pytest.mark.parametrize("size", [0, 1, 5, 255, 256, 257, 1003])
def test_any_size_is_quantized(backend: str, size: int) -> None:
    partition = partition_of(size)
    optimizer = AdamW([partition])
    for seed in range(3):
        partition.grad = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    state = optimizer.state[partition]
    assert state["exp_avg_codes"].dtype is torch.uint8
    assert state["exp_avg_absmax"].shape == (1, -(-size // 256))
    assert set(state) == {
        "step", "exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax",
    }  # fmt: skip
    assert state["step"] == 3


def test_it_is_the_flat_layout_of_the_plain_optimizer() -> None:
    ours, plain = partition_of(700), partition_of(700)
    optimizers = [
        AdamW([ours], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, blocksize=128),
        optim.AdamW(
            [plain], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, blocksize=128,
            layout="flat",
        ),
    ]  # fmt: skip
    for _ in range(3):
        ours.grad = plain.grad = partition_of(700, 1).detach()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(ours.detach(), plain.detach())


def test_groups_are_swapped_between_steps() -> None:
    """As stage 3 does it: the groups hold one vector at a time, and none in between."""
    partitions = [partition_of(300, seed) for seed in range(3)]
    expected = [partition_of(300, seed) for seed in range(3)]
    optimizer = AdamW(partitions, state_bits=8)
    together = AdamW(expected, state_bits=8)
    for _ in range(4):
        for ours, plain in zip(partitions, expected, strict=True):
            ours.grad = plain.grad = partition_of(300, 9).detach()
            optimizer.param_groups[0]["params"] = [ours]
            optimizer.step()
            optimizer.param_groups[0]["params"] = []
        together.step()
    for ours, plain in zip(partitions, expected, strict=True):
        assert optimizer.state[ours]["step"] == 4
        assert_same_bits(ours.detach(), plain.detach())


def test_hooks_run_once_even_when_the_plain_class_has_been_stepped() -> None:
    plain, ours = partition_of(4), partition_of(4)
    plain.grad = ours.grad = torch.ones(4)
    optim.AdamW([plain]).step()
    optimizer, calls = AdamW([ours]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_names_are_dropped_with_the_parameters_they_were_of() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = AdamW(list(layer.named_parameters()))
    assert "param_names" not in optimizer.param_groups[0]
    optimizer = AdamW([{"params": [("w", layer.weight)]}, {"params": [("b", layer.bias)]}])
    assert optimizer.param_groups[1]["params"] == [layer.bias]


def foreign_state(size: int, step: Any) -> dict[str, Any]:
    return {
        "step": step,
        "exp_avg": partition_of(size, 5).detach() * 1e-3,
        "exp_avg_sq": partition_of(size, 6).detach().square() * 1e-6,
    }


@pytest.mark.parametrize("step", [4, 4.0, torch.tensor(4), torch.tensor([4.0])], ids=repr)
def test_moments_of_a_universal_checkpoint_are_quantized(step: Any) -> None:
    partition, reference = partition_of(700), partition_of(700)
    optimizer = AdamW([partition])
    optimizer.state[partition].update(foreign_state(700, step))
    prepared = AdamW([reference])
    state = prepared.state[reference]
    state["step"] = torch.tensor(4.0)
    for moment in ("exp_avg", "exp_avg_sq"):
        codes, absmax = quantize_moment(moment, foreign_state(700, step)[moment])
        state[f"{moment}_codes"], state[f"{moment}_absmax"] = codes, absmax
    partition.grad = reference.grad = partition_of(700, 7).detach()
    with pytest.warns(UserWarning, match="moments of a universal checkpoint are fp32"):
        optimizer.step()
    prepared.step()
    assert "exp_avg" not in optimizer.state[partition]
    assert optimizer.state[partition]["step"] == 5
    for key, value in prepared.state[reference].items():
        assert_same_bits(optimizer.state[partition][key], value, key)
    assert_same_bits(partition.detach(), reference.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_that_all_partitions_share_is_counted_for_each() -> None:
    partitions = [partition_of(300, seed) for seed in range(3)]
    optimizer, shared = AdamW(partitions, state_bits=32), torch.tensor(4.0)
    for partition in partitions:
        optimizer.state[partition].update(foreign_state(300, shared))
        partition.grad = torch.ones(300)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in partitions] == [5.0] * 3
    assert shared == 4


def test_a_universal_checkpoint_does_not_change_how_states_are_stored() -> None:
    partition = partition_of(700)
    optimizer = AdamW([partition], blocksize=128)
    optimizer.state[partition].update(foreign_state(700, 4))
    optimizer.param_groups[0].update(state_bits=32, blocksize=256, layout="rows", lr=0.5)
    partition.grad = torch.ones(700)
    with pytest.warns(UserWarning, match="moments of a universal checkpoint are fp32"):
        optimizer.step()
    assert optimizer.state[partition]["exp_avg_absmax"].shape == (1, 6)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_moments_of_all_groups_are_quantized_at_the_first_step_of_one() -> None:
    partitions = [partition_of(300, seed) for seed in range(2)]
    optimizer = AdamW([{"params": [partition]} for partition in partitions])
    for partition in partitions:
        optimizer.state[partition].update(foreign_state(300, 4))
        partition.grad = torch.ones(300)
    groups = optimizer.param_groups
    optimizer.param_groups = groups[:1]
    with pytest.warns(UserWarning, match="moments of a universal checkpoint are fp32"):
        optimizer.step()
    assert "exp_avg" not in optimizer.state[partitions[1]]
    optimizer.param_groups = groups[1:]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in partitions] == [5.0] * 2


def test_moments_without_a_step_are_refused() -> None:
    partition = partition_of(10)
    optimizer = AdamW([partition])
    state = foreign_state(10, 4)
    del state["step"]
    optimizer.state[partition].update(state)
    partition.grad = torch.ones(10)
    with pytest.raises(ValueError, match=r"must have a step .*, got exp_avg, exp_avg_sq alone"):
        optimizer.step()


def test_options_that_a_partition_cannot_have() -> None:
    partition = partition_of(10)
    for option in ("max_grad_norm", "skip_nonfinite", "layout", "bf16_params", "seed"):
        with pytest.raises(TypeError, match=option):
            AdamW([partition], **{option: 1})  # type: ignore[arg-type]
    for option, value in (("layout", "rows"), ("state_bits", 32), ("blocksize", 128)):
        with pytest.raises(ValueError, match=f"{option} must be .* in all groups, got '?{value}"):
            AdamW([{"params": [partition], option: value}])
    with pytest.raises(ValueError, match="state_bits must be one of"):
        AdamW([partition], state_bits=4)


def test_a_configuration_is_completed(tmp_path: Path) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    completed = complete_config(config)
    assert completed == {**config, "zero_allow_untested_optimizer": True}
    assert "zero_allow_untested_optimizer" not in config
    check_config(completed)

    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    completed = complete_config(path)
    assert completed["zero_force_ds_cpu_optimizer"] is False
    check_config(completed)
    check_config({})  # without ZeRO DeepSpeed takes any optimizer


def test_what_is_missing_is_named_all_at_once() -> None:
    config = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "zero_allow_untested_optimizer": False,
    }
    with pytest.raises(ValueError, match="zero_allow_untested_optimizer must be true") as error:
        check_config(config)
    assert str(error.value) == (
        "deepspeed config: zero_allow_untested_optimizer must be true, got false; "
        "deepspeed config: zero_force_ds_cpu_optimizer must be false with offload_optimizer, "
        "got nothing"
    )


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, r"device must be cpu or none .* got nvme"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"ratio must be 1\.0 .* got 0\.5"),
        ({"elastic_checkpoint": True}, r"elastic_checkpoint must be false"),
        ({"zenflow": {"topk_ratio": 0.1}}, r"zenflow must be left out"),
    ],
    ids=["nvme", "ratio", "elastic", "zenflow"],
)
def test_what_is_in_the_way_is_not_completed(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete_config({"zero_optimization": {"stage": 3, **zero}})
