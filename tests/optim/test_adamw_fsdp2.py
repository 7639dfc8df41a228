"""AdamW over DTensors, in processes over gloo: FSDP2 and HSDP equal one process bit for bit."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk.optim import AdamW, gradient_norm
from tests.optim.processes import run_ranks

Results = dict[str, Any]

# Uneven everywhere; the last layer has fewer rows than ranks.
SIZES = (65, 129, 70, 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "8 bits": {"max_grad_norm": 0.5},
    "16 bits": {"state_bits": 16, "lr": torch.tensor(1e-2)},
    "32 bits": {"state_bits": 32, "skip_nonfinite": True},
    "bf16, remainder": {"dtype": torch.bfloat16, "max_grad_norm": 0.5},
    "bf16, stochastic": {"dtype": torch.bfloat16, "bf16_params": "stochastic", "seed": 3},
}


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(SIZES)))


def optimizer_of(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(model.named_parameters(), min_quantized_numel=100, **options)


def gradient(param: torch.Tensor, index: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def cut(whole: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def train(model: nn.Module, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(model.parameters()):
            whole = gradient(param, i, step)
            param.grad = cut(whole, param) if hasattr(param, "placements") else whole
        optimizer.step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def everything(model: nn.Module, optimizer: AdamW) -> Results:
    """Parameters and states by name, as whole tensors."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = full(param)
        for key, value in optimizer.state[param].items():
            found[f"{name}.{key}"] = full(value)
    return found


def alone(options: dict[str, Any], steps: int = 4) -> tuple[Results, AdamW]:
    model = build(options.get("dtype", torch.float32))
    optimizer = optimizer_of(model, **{k: v for k, v in options.items() if k != "dtype"})
    train(model, optimizer, range(steps))
    return everything(model, optimizer), optimizer


def check_equal(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert torch.equal(found[name], value), name


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(rank: int, world_size: int, folder: str) -> list[tuple[str, Results, float | None]]:
    """Every set of options; then what can go wrong; then a checkpoint for other world sizes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world_size,))
    results = []
    for name, options in OPTIONS.items():
        model = shard(build(options.get("dtype", torch.float32)), mesh)
        optimizer = optimizer_of(model, **{k: v for k, v in options.items() if k != "dtype"})
        train(model, optimizer, range(4))
        for param in model.parameters():
            for key, value in optimizer.state[param].items():
                placed = isinstance(value, DTensor)
                assert placed == (key != "step")
                assert not placed or value.placements == param.placements
        assert gradient_norm(model.parameters()) > 0
        results.append((name, everything(model, optimizer), optimizer.last_grad_norm))
    check_skipping(model, rank, world_size)
    check_loading(model, mesh)
    check_scaler(mesh, rank, world_size)

    model = shard(build(), mesh)
    optimizer = optimizer_of(model)
    if Path(folder, ".metadata").exists():
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(saved, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        results.append(("loaded", everything(model, optimizer), None))
    else:
        train(model, optimizer, range(4))
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    return results


def check_skipping(model: nn.Module, rank: int, world_size: int) -> None:
    """A NaN that only the last rank has: all leave the step out and name the same parameter."""
    optimizer = optimizer_of(model, skip_nonfinite=True, bf16_params="stochastic")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    params = list(model.parameters())
    if rank == world_size - 1:
        params[2].grad.to_local()[0, 0] = math.nan
        params[4].grad.to_local().fill_(math.inf)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert "parameter 2 ('1.weight')" in str(caught[0].message)
    assert (optimizer.skipped_steps, optimizer.nonfinite_parameter) == (
        1, "parameter 2 ('1.weight')",
    )  # fmt: skip
    check_equal(everything(model, optimizer), before)


def check_scaler(mesh: Any, rank: int, world_size: int) -> None:
    """A real backward under GradScaler; an infinity that one rank has is found by all."""
    model = shard(build(), mesh)
    optimizer = optimizer_of(model, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        inputs = torch.randn(6, SIZES[0], generator=torch.Generator().manual_seed(rank))
        scaler.scale(model(inputs).square().mean()).backward()
        if step == 2 and rank == world_size - 1:
            model[1].weight.grad.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(state["step"] == 3 for state in optimizer.state.values())


def check_loading(model: nn.Module, mesh: Any) -> None:
    """load_state_dict takes DTensors placed alike, cuts whole tensors, and refuses others."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.tensor import Replicate, distribute_tensor

    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state_dict = optimizer.state_dict()
    whole = {
        key: {name: full(value) for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    expected = everything(model, optimizer)
    for state in (state_dict["state"], whole):
        other = optimizer_of(model)
        other.load_state_dict({**state_dict, "state": state})
        check_equal(everything(model, other), expected)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(model, optimizer, options=options)
    other = optimizer_of(model)
    other.zero_grad()  # torch makes the states to load into by a step, unless there are gradients
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, other, gathered, options=options)
    check_equal(everything(model, other), expected)
    copied = {key: dict(state) for key, state in whole.items()}
    codes = copied[0]["exp_avg_codes"]
    copied[0]["exp_avg_codes"] = distribute_tensor(codes, mesh, [Replicate()], src_data_rank=None)
    with pytest.raises(ValueError, match=r"exp_avg_codes of parameter 0 .* must be placed as"):
        optimizer_of(model).load_state_dict({**state_dict, "state": copied})
    plain = optimizer_of(build(torch.bfloat16))
    with pytest.raises(TypeError, match="must be a plain tensor as the parameter is, got a DT"):
        plain.load_state_dict(state_dict)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_fsdp2_is_one_process_bit_for_bit(tmp_path: Path) -> None:
    by_world = {n: run_ranks(fsdp2, n, str(tmp_path / "saved"), timeout=240) for n in (3, 2)}
    for name, options in OPTIONS.items():
        expected, optimizer = alone(options)
        for world_size, ranks in by_world.items():
            for results in ranks:
                found, norm = {label: rest for label, *rest in results}[name]
                check_equal(found, expected)
                assert norm == optimizer.last_grad_norm, (name, world_size)
    # What three ranks have saved, two load and one does.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    expected, _ = alone({})
    for results in by_world[2]:
        loaded = results[-1]
        assert loaded[0] == "loaded"
        states = {k: v for k, v in expected.items() if k.count(".") > 1}
        check_equal({k: v for k, v in loaded[1].items() if k.count(".") > 1}, states)
    model = build()
    optimizer = optimizer_of(model)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    check_equal({k: v for k, v in everything(model, optimizer).items() if k in states}, states)


def two_dimensions(rank: int, world_size: int) -> dict[str, Any]:
    """Four ranks: HSDP, both dimensions on rows, and tensor parallelism under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    results: dict[str, Any] = {}
    stochastic = {"bf16_params": "stochastic", "seed": 3, "max_grad_norm": 0.5}

    # HSDP: the generator of torch differs between the replicas and must not matter.
    model = shard(build(torch.bfloat16), mesh)
    torch.manual_seed(rank)
    optimizer = optimizer_of(model, **stochastic)
    train(model, optimizer, range(4))
    results["hsdp"] = everything(model, optimizer)
    results["local"] = [p.to_local().clone() for p in model.parameters()]

    for name, placements in (("rows twice", [Shard(0), Shard(0)]), ("whole", [Replicate()] * 2)):
        model = build(torch.bfloat16)
        for layer in model.children():
            for key, param in list(layer.named_parameters()):
                placed = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
                setattr(layer, key, nn.Parameter(placed))
        optimizer = optimizer_of(model, **stochastic)
        train(model, optimizer, range(4))
        results[name] = everything(model, optimizer)

    def tensor_parallel() -> nn.Module:
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        return shard(parallelize_module(build(), mesh["inner"], plan), mesh["outer"])

    model = tensor_parallel()
    results["placements"] = [str(p.placements) for p in model.parameters()]
    optimizer = optimizer_of(model, state_bits=32)
    train(model, optimizer, range(4))
    results["tensor parallel"] = everything(model, optimizer)
    optimizer = optimizer_of(model, state_bits=16, max_grad_norm=1e9)
    train(model, optimizer, range(4, 5))
    results["norm"] = optimizer.last_grad_norm
    results["tensor parallel again"] = everything(model, optimizer)
    eight = optimizer_of(model)
    with pytest.raises(NotImplementedError) as refusal:
        train(model, eight, range(1))
    results["refusal"] = str(refusal.value)
    flat = AdamW([model.get_parameter("2.bias")], layout="flat")
    with pytest.raises(NotImplementedError, match=r"must be a matrix .* got shape \(2,\)"):
        flat.step()
    return results


def test_two_mesh_dimensions() -> None:
    ranks = run_ranks(two_dimensions, 4, timeout=240)
    options = {
        "dtype": torch.bfloat16, "bf16_params": "stochastic", "seed": 3, "max_grad_norm": 0.5,
    }  # fmt: skip
    expected, _ = alone(options)
    model = build()
    train(model, optimizer := optimizer_of(model, state_bits=32), range(4))
    exact = everything(model, optimizer)
    train(model, optimizer := optimizer_of(model, state_bits=16, max_grad_norm=1e9), range(4, 5))
    again = everything(model, optimizer)
    for results in ranks:
        for name in ("hsdp", "rows twice", "whole"):
            check_equal(results[name], expected)
        check_equal(results["tensor parallel"], exact)
        check_equal(results["tensor parallel again"], again)
        # Rows are cut here: equal on all ranks, and to the whole's up to fp64's rounding.
        assert results["norm"] == ranks[0]["norm"]
        assert results["norm"] == pytest.approx(optimizer.last_grad_norm, rel=1e-14)
        assert "_StridedShard" in results["placements"][0]
        assert "parameter 0 ('0.weight') must be a matrix placed by Shard(0)" in results["refusal"]
        assert "_StridedShard" in results["refusal"]
    # full_tensor looks at one replica only: the ranks' own parts are compared as well.
    for a, b in ((0, 2), (1, 3)):
        pairs = zip(ranks[a]["local"], ranks[b]["local"], strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
