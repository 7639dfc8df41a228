"""AdamW's state dict: saved and loaded bit for bit, with its dtypes, or refused by name."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from feinwerk.optim import AdamW

SHAPES = [(64, 80), (33,), (4, 5)]


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(tensor(shape, i, dtype)) for i, shape in enumerate(SHAPES)]


def train(params: list[Any], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(params):
            param.grad = tensor(param.shape, 1000 + 10 * step + i, param.dtype)
        optimizer.step()


def trained(steps: int = 3, **options: Any) -> tuple[list[Any], AdamW]:
    params = parameters(options.pop("dtype", torch.float32))
    optimizer = AdamW(params, **options)
    train(params, optimizer, range(steps))
    return params, optimizer


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Through a file that is read without pickle's freedom."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same_states(a: AdamW, b: AdamW) -> bool:
    pairs = zip(a.state.values(), b.state.values(), strict=True)
    return all(
        list(x) == list(y) and all(x[n].dtype is y[n].dtype and torch.equal(x[n], y[n]) for n in x)
        for x, y in pairs
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "bf16_params": "stochastic", "seed": 7},
        {"state_bits": 16},
        {"state_bits": 32, "lr": torch.tensor(1e-2)},
        {"layout": "flat", "blocksize": 64},
        {"min_quantized_numel": 1, "betas": (0.8, 0.99)},
    ],
    ids=str,
)
def test_loaded_is_saved_and_goes_on_alike(options: dict[str, Any]) -> None:
    params, optimizer = trained(**dict(options))
    layout = {k: v for k, v in options.items() if k not in ("dtype", "lr", "betas", "seed")}
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW(again, **layout)
    other.load_state_dict(saved(optimizer))
    assert same_states(optimizer, other)
    assert all(type(t) is torch.Tensor for p in again for t in other.state[p].values())
    for name in ("lr", "betas", "seed"):
        assert other.param_groups[0][name] == optimizer.param_groups[0][name]
    train(params, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert same_states(optimizer, other)


def test_what_was_loaded_is_a_copy() -> None:
    params, optimizer = trained()
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict["state"])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW(twins)
    other.load_state_dict(state_dict)
    train(twins, other, range(3, 5))
    for index, state in before.items():
        assert all(torch.equal(t, state_dict["state"][index][n]) for n, t in state.items())


def test_hooks_see_what_torch_shows_them() -> None:
    params, optimizer = trained()
    state_dict = saved(optimizer)
    key = next(iter(state_dict["state"]))
    seen: list[Any] = []
    other = AdamW(params)

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["state"][key]["exp_avg_codes"].dtype)
        return {**state_dict, "state": {**state_dict["state"], "more": 1}}

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[params[0]]["exp_avg_codes"].dtype)
    )
    other.load_state_dict(state_dict)
    assert seen == [torch.uint8, torch.uint8]
    assert other.state["more"] == 1
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1
    other.load_state_dict(state_dict)
    assert len(seen) == 4


def test_torch_s_32_bit_states_can_be_taken_over() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=3e-3)
    train(params, theirs, range(3))
    ours = AdamW(params, state_bits=32)
    ours.load_state_dict(saved(theirs))
    assert ours.param_groups[0]["lr"] == 3e-3
    assert ours.param_groups[0]["blocksize"] == 256
    for p in params:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[p][name], theirs.state[p][name])
    train(params, ours, range(3, 4))
    assert float(ours.state[params[0]]["step"]) == 4
    eight = AdamW(params)
    with pytest.raises(ValueError, match="state of parameter 0 must have step, exp_avg_codes"):
        eight.load_state_dict(saved(theirs))


def test_a_parameter_that_was_never_stepped_has_no_state() -> None:
    params = parameters()
    optimizer = AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    other = AdamW(params)
    other.load_state_dict(saved(optimizer))
    assert list(other.state) == [params[0]]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("state_bits", 32, "must be 32 as in this optimizer, got 8"),
        ("blocksize", 64, "must be 64 as in this optimizer, got 256"),
        ("layout", "flat", "must be 'flat' as in this optimizer"),
        ("min_quantized_numel", 7, "must be 7"),
        ("bf16_params", "stochastic", "must be 'stochastic'"),
    ],
)  # fmt: skip
def test_another_layout_is_refused(option: str, value: Any, message: str) -> None:
    _, optimizer = trained()
    other = AdamW(parameters(), **{option: value})
    with pytest.raises(ValueError, match=f"AdamW: {option} of group 0 in state_dict {message}"):
        other.load_state_dict(saved(optimizer))
    assert not other.state
    assert other.param_groups[0][option] == value


def damage(state: dict[int, dict[str, Any]], how: str) -> None:
    first = state[0]
    if how == "dtype":
        first["exp_avg_codes"] = first["exp_avg_codes"].float()
    elif how == "half":
        first["exp_avg_sq_absmax"] = first["exp_avg_sq_absmax"].bfloat16()
    elif how == "shape":
        first["exp_avg_sq_codes"] = first["exp_avg_sq_codes"][:-1]
    elif how == "blocks":
        first["exp_avg_absmax"] = first["exp_avg_absmax"].repeat(1, 2)
    elif how == "missing":
        del first["exp_avg_absmax"]
    elif how == "more":
        first["max_exp_avg_sq"] = torch.zeros(3)
    elif how == "number":
        first["exp_avg_codes"] = 5


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("dtype", TypeError, r"exp_avg_codes of it must be torch.uint8, got torch.float32"),
        ("half", TypeError, r"exp_avg_sq_absmax of it must be torch.float32, got torch.bf"),
        ("shape", ValueError, r"exp_avg_sq_codes of it must have shape \(64, 80\), got \(63"),
        ("blocks", ValueError, r"exp_avg_absmax of it must have shape \(64, 1\), got \(64, 2"),
        ("missing", ValueError, r"state of it must have .*, got .*exp_avg_codes"),
        ("more", ValueError, r"state of it must have .*, got .*max_exp_avg_sq"),
        ("number", TypeError, r"exp_avg_codes of it must be a torch.Tensor, got int"),
    ],
)  # fmt: skip
def test_damage_is_named_and_changes_nothing(
    how: str, error: type[Exception], message: str
) -> None:
    _, optimizer = trained()
    state_dict = saved(optimizer)
    damage(state_dict["state"], how)
    params = parameters()
    other = AdamW(zip("abc", params, strict=True), lr=0.5)
    train(params, other, range(1))
    before = copy.deepcopy(list(other.state.values()))
    message = message.replace("of it", r"of parameter 0 \('a'\)")
    with pytest.raises(error, match=f"AdamW: {message}"):
        other.load_state_dict(state_dict)
    after = list(other.state.values())
    assert other.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(x[n], y[n]) for x, y in zip(before, after, strict=True) for n in x)


def test_other_groups_are_refused_as_torch_does() -> None:
    _, optimizer = trained()
    params = parameters()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamW([{"params": [p]} for p in params]).load_state_dict(saved(optimizer))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        AdamW(params[:2]).load_state_dict(saved(optimizer))


def test_a_model_and_its_optimizer_by_name() -> None:
    """torch.distributed.checkpoint's functions, which name states by parameter, in one process."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 3))

    def run(net: torch.nn.Module, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            net(tensor((5, 80), step)).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()

    net = model()
    optimizer = AdamW(net.parameters(), lr=torch.tensor(1e-2))
    run(net, optimizer, range(3))
    named = get_optimizer_state_dict(net, optimizer)
    assert named["state"]["0.weight"]["exp_avg_codes"].dtype is torch.uint8
    again = model()
    again.load_state_dict(net.state_dict())
    other = AdamW(reversed(list(again.parameters())), lr=torch.tensor(1.0))
    set_optimizer_state_dict(again, other, copy.deepcopy(named))
    assert float(other.param_groups[0]["lr"]) == pytest.approx(1e-2)
    run(net, optimizer, range(3, 5))
    run(again, other, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
