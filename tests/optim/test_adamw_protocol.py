"""AdamW as a torch optimizer: groups, schedulers, closures, GradScaler, clipping, refusals."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from feinwerk.optim import AdamW, gradient_norm
from feinwerk.optim.gradient_norm import clip_coefficient

SHAPES = [(64, 80), (33,), (70, 66)]


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(tensor(shape, i, dtype)) for i, shape in enumerate(SHAPES)]


def give_gradients(params: list[Any], step: int, factor: float = 1.0) -> None:
    for i, param in enumerate(params):
        param.grad = tensor(param.shape, 1000 + 10 * step + i, param.dtype) * factor


def train(params: list[Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


def test_groups_have_options_of_their_own() -> None:
    options: list[dict[str, Any]] = [
        {"lr": 1e-2, "weight_decay": 0.1, "blocksize": 64},
        {"betas": (0.8, 0.99), "eps": 1e-6},
        {"state_bits": 32, "maximize": True},
    ]
    together, alone = parameters(), parameters()
    optimizer = AdamW([{"params": [p], **o} for p, o in zip(together, options, strict=True)])
    train(together, optimizer, 4)
    for i, (param, own) in enumerate(zip(alone, options, strict=True)):
        single = AdamW([param], **own)
        for step in range(4):
            param.grad = tensor(param.shape, 1000 + 10 * step + i)
            single.step()
    assert same(together, alone)
    assert optimizer.state[together[0]]["exp_avg_absmax"].shape == (64, 2)
    assert optimizer.state[together[2]]["exp_avg"].dtype is torch.float32
    plain = parameters()
    train(plain, AdamW(plain), 4)
    assert not any(torch.equal(p, q) for p, q in zip(plain, together, strict=True))


def test_a_group_added_later_starts_at_its_own_first_step() -> None:
    params = parameters()
    optimizer = AdamW(params[:2])
    train(params[:2], optimizer, 2)
    optimizer.add_param_group({"params": params[2], "lr": 1e-2})
    train(params, optimizer, 1)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 3, 1]
    with pytest.raises(ValueError, match="AdamW: blocksize must be a whole number"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "blocksize": 0})
    assert len(optimizer.param_groups) == 2


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = AdamW(params, max_grad_norm=1.0)
    for step in range(3):
        give_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    train(params, optimizer, 1)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 1, 4]


def test_parameters_may_be_exchanged_before_the_first_step() -> None:
    """Accelerate's way of sharding: placeholders, then other tensors, in the same groups."""
    expected = parameters()
    train(expected, AdamW(expected), 2)
    optimizer = AdamW([torch.nn.Parameter(torch.empty(1)) for _ in SHAPES])
    params = parameters()
    optimizer.param_groups[0]["params"] = params
    train(params, optimizer, 2)
    assert same(params, expected)
    assert set(optimizer.state) == set(params)


def test_schedulers_and_tensor_lr() -> None:
    finals = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params = parameters()
        optimizer = AdamW(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        rates = []
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        finals.append(params)
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 1e-9
    assert same(*finals)
    constant = parameters()
    train(constant, AdamW(constant, lr=0.01), 5)
    assert not same(constant, finals[0])


def test_a_closure_is_called_once_with_gradients_on() -> None:
    params, expected = parameters(), parameters()
    optimizer = AdamW(params)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure)) for _ in range(2)]
    assert losses == calls
    assert losses[1] < losses[0]
    plain = AdamW(expected)
    for _ in range(2):
        for p in expected:
            p.grad = 2 * p.detach()
        plain.step()
    assert same(params, expected)
    assert plain.step() is None


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_grad_scaler(unscale: bool, max_grad_norm: float | None) -> None:
    """A power of two as scale changes no bit; an infinity skips the step and halves the scale."""
    params, expected = parameters(), parameters()
    a = AdamW(params, max_grad_norm=max_grad_norm)
    b = AdamW(expected, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaler.scale(torch.ones(()))  # initialises its scale, as a loss would
    for step in range(4):
        give_gradients(params, step, scaler.get_scale())
        bad = step == 1
        if bad:
            params[2].grad[3, 4] = math.inf
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        assert not hasattr(a, "grad_scale")
        if not bad:
            give_gradients(expected, step)
            b.step()
        assert scaler.get_scale() == (2.0**10 if step < 1 else 2.0**9)
        assert a.last_grad_norm == b.last_grad_norm
    assert same(params, expected)
    assert [float(a.state[p]["step"]) for p in params] == [3, 3, 3]


def test_clipping_scales_inside_of_the_step() -> None:
    params, expected = parameters(), parameters()
    optimizer, plain = AdamW(params, max_grad_norm=0.5), AdamW(expected)
    for step in range(3):
        give_gradients(params, step)
        norm = gradient_norm(params)
        optimizer.step()
        assert optimizer.last_grad_norm == norm
        give_gradients(expected, step)
        # The gradients are still what they were given as.
        assert same([p.grad for p in params], [p.grad for p in expected])
        for p in expected:
            p.grad *= torch.tensor(clip_coefficient(norm, 0.5))
        plain.step()
    assert same(params, expected)
    loose, unclipped = parameters(), parameters()
    train(loose, AdamW(loose, max_grad_norm=1e9), 3)
    train(unclipped, AdamW(unclipped), 3)
    assert same(loose, unclipped)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_with_bad_gradients_can_be_skipped(value: float) -> None:
    params, expected = parameters(), parameters()
    names = ["first", "second", "third"]
    optimizer = AdamW(zip(names, params, strict=True), skip_nonfinite=True)
    plain = AdamW(expected)
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            params[1].grad[7] = params[2].grad[0, 0] = value
            states = copy.deepcopy([dict(optimizer.state[p]) for p in params])
            with pytest.warns(RuntimeWarning, match=r"first bad one in parameter 1 \('second'\)"):
                optimizer.step()
            for p, old in zip(params, states, strict=True):
                assert all(torch.equal(t, old[name]) for name, t in optimizer.state[p].items())
        else:
            optimizer.step()
            give_gradients(expected, step)
            plain.step()
    assert same(params, expected)
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "parameter 1 ('second')"
    assert optimizer.last_grad_norm is not None
    assert math.isfinite(optimizer.last_grad_norm)


def test_without_skipping_a_nan_is_passed_on() -> None:
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, state_bits=32)
    give_gradients(params, 0)
    params[1].grad[0] = math.nan
    optimizer.step()
    assert all(bool(p.isnan().all()) for p in params)  # as after torch's clip_grad_norm_


def test_copies_and_pickles_go_on_alike() -> None:
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    train(params, optimizer, 2)
    optimizer.skipped_steps = 3
    twins = [
        copy.deepcopy((params, optimizer)),
        pickle.loads(pickle.dumps((params, optimizer))),
    ]
    train(params, optimizer, 2)
    for others, twin in twins:
        assert not same(params, others)
        train(others, twin, 2)
        assert same(params, others)
        assert (twin.max_grad_norm, twin.skip_nonfinite, twin.skipped_steps) == (1.0, True, 3)
        assert twin.last_grad_norm == optimizer.last_grad_norm


def test_hooks_and_zero_grad() -> None:
    params = parameters()
    optimizer = AdamW(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(params, optimizer, 1)
    optimizer.zero_grad()
    assert seen == ["before", "after"]
    assert all(p.grad is None for p in params)
    assert "state_bits: 8" in repr(optimizer)


def test_a_saved_tensor_that_the_step_changed_is_noticed() -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    loss = (param * param).sum()
    param.grad = torch.ones(64, 64)
    AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = AdamW(table.named_parameters())
    with pytest.raises(NotImplementedError, match=r"gradient of parameter 0 \('weight'\) must be"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    message = rf"AdamW: params\[0\] must be torch.float32 or torch.bfloat16, got {dtype}"
    with pytest.raises(TypeError, match=message):
        AdamW([param])
    frozen = param.detach()
    optimizer = AdamW([frozen, torch.nn.Parameter(torch.zeros(2))])
    optimizer.step()
    frozen.requires_grad_()
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(TypeError, match=r"AdamW: parameter 0 must be torch.float32"):
        optimizer.step()


def test_frozen_codes_may_be_handed_over() -> None:
    codes = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    params = [codes, *parameters()]
    optimizer = AdamW(params, max_grad_norm=1.0)
    train(params[1:], optimizer, 1)
    assert codes not in optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element, got \(2,\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0"),
        ({"state_bits": 4}, "state_bits must be one of 8, 16, 32, got 4"),
        ({"blocksize": 0}, "blocksize must be a whole number of at least 1"),
        ({"blocksize": 2.5}, "blocksize must be a whole number of at least 1"),
        ({"bf16_params": "nearest"}, "bf16_params must be one of 'remainder', 'stochastic'"),
        ({"layout": "columns"}, "layout must be one of 'rows', 'flat', got 'columns'"),
        ({"min_quantized_numel": 0}, "min_quantized_numel must be a whole number"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"seed": 2**63}, "seed must be a whole number of 64 bits"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdamW: {message}"):
        AdamW(parameters(), **options)
