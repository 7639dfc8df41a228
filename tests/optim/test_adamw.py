"""AdamW on one process: values against fp64, what its states are, options, refusals, seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from feinwerk.optim import AdamW
from feinwerk.optim.state import StepItem, new_state, step_parameters

U = 2.0**-24  # half a unit in the last place of 1, in fp32


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(tensor(shape, i, dtype)) for i, shape in enumerate(shapes)]


def train(params: list[Any], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Steps over given gradients; no model, so that nothing but the optimizer is compared."""
    for step in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = tensor(param.shape, 1000 + 10 * step + i, param.dtype)
        optimizer.step()


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


class Truth:
    """AdamW in fp64 beside a bound of what fp32 may lose: one U a rounding, to first order.

    Errors are carried from step to step: e_m, e_v, e_p bound |fp32 - fp64| of the moments and the
    parameter. Hyper-parameters rounded to fp32 count as one more rounding each.
    """

    def __init__(self, param: torch.Tensor) -> None:
        self.p, zero = param.detach().double(), torch.zeros_like(param, dtype=torch.float64)
        self.m, self.v, self.e_m, self.e_v, self.e_p = (zero.clone() for _ in range(5))
        self.t = 0

    def step(self, grad: torch.Tensor, lr: float, decay: float = 0.01, eps: float = 1e-8) -> None:
        b1, b2 = 0.9, 0.999
        g, self.t = grad.double(), self.t + 1
        self.e_m = b1 * self.e_m + 4 * U * (1 - b1) * (g - self.m).abs()
        self.m = b1 * self.m + (1 - b1) * g
        self.e_m += U * self.m.abs()
        self.e_v = b2 * self.e_v + 2 * U * b2 * self.v + 3 * U * (1 - b2) * g * g
        self.v = b2 * self.v + (1 - b2) * g * g
        self.e_v += U * self.v
        correction = 1 / math.sqrt(1 - b2**self.t)
        root = self.v.sqrt() * correction
        denominator = root + eps
        # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(b)
        e_root = correction * self.e_v / self.v.sqrt().clamp_min(1e-300)
        e_denominator = e_root + 4 * U * root + 2 * U * denominator
        ratio = self.m / denominator
        least = denominator - e_denominator
        e_ratio = (self.e_m + ratio.abs() * e_denominator) / least + U * ratio.abs()
        size = lr / (1 - b1**self.t)
        self.p = self.p * (1 - lr * decay) - size * ratio
        self.e_p = self.e_p + size * (e_ratio + 2 * U * ratio.abs()) + 3 * U * self.p.abs()

    def holds(self, param: torch.Tensor) -> bool:
        # 1 %: the second order.
        return bool(((param.detach().double() - self.p).abs() <= 1.01 * self.e_p).all())


def test_32_bits_are_torch_s_adamw_within_rounding() -> None:
    shapes: list[tuple[int, ...]] = [(70, 70), (33,), (3, 5, 7), ()]
    ours, torchs = parameters(shapes), parameters(shapes)
    truths = [Truth(p) for p in ours]
    optimizer = AdamW(ours, lr=3e-3, state_bits=32)
    peer = torch.optim.AdamW(torchs, lr=3e-3)
    for step in range(25):
        train(ours, optimizer, 1, step)
        train(torchs, peer, 1, step)
        for p, truth in zip(ours, truths, strict=True):
            truth.step(p.grad, 3e-3)
    for p, q, truth in zip(ours, torchs, truths, strict=True):
        assert truth.holds(p)
        assert truth.holds(q)


def test_the_bound_notices_a_wrong_decay() -> None:
    param = parameters([(70, 70)])
    truth, optimizer = Truth(param[0]), AdamW(param, lr=3e-3, weight_decay=0.0101, state_bits=32)
    for step in range(3):
        train(param, optimizer, 1, step)
        truth.step(param[0].grad, 3e-3)
    assert not truth.holds(param[0])


@pytest.mark.parametrize(("bits", "relative"), [(8, 0.02), (16, 0.004)])
def test_fewer_bits_stay_near_the_32_bit_path(bits: int, relative: float) -> None:
    """Relative to the way gone; codes of the dynamic maps are up to 1.6 % of absmax apart."""
    few, full = parameters([(96, 300)]), parameters([(96, 300)])
    start = full[0].detach().clone()
    train(few, AdamW(few, lr=1e-2, state_bits=bits), 20)
    train(full, AdamW(full, lr=1e-2, state_bits=32), 20)
    way = (full[0] - start).norm()
    assert 0 < (few[0] - full[0]).norm() < relative * way


def test_the_states_are_plain_tensors_of_two_bytes() -> None:
    params = parameters([(64, 500), (10, 10), (500,), (8, 8, 3, 40)])
    params.append(torch.nn.Parameter(tensor((64, 512), 9, torch.bfloat16)))
    optimizer = AdamW(params)
    assert not optimizer.state
    train(params, optimizer, 1)
    seen = [
        {name: (t.dtype, tuple(t.shape)) for name, t in optimizer.state[p].items()} for p in params
    ]
    u8, f32 = torch.uint8, torch.float32

    def codes(shape: tuple[int, ...], absmax: tuple[int, int]) -> dict[str, Any]:
        moments = ("exp_avg", "exp_avg_sq")
        tables = {f"{m}_codes": (u8, shape) for m in moments}
        return {"step": (f32, ())} | tables | {f"{m}_absmax": (f32, absmax) for m in moments}

    plain = {"step": (f32, ()), "exp_avg": (f32, (10, 10)), "exp_avg_sq": (f32, (10, 10))}
    assert seen[0] == codes((64, 500), (64, 2))
    assert seen[1] == plain
    assert seen[2] == {k: (d, (500,) if s else s) for k, (d, s) in plain.items()}
    assert seen[3] == codes((8, 8, 3, 40), (8, 4))
    assert seen[4] == codes((64, 512), (64, 2)) | {"param_remainder": (u8, (64, 512, 2))}
    assert all(type(t) is torch.Tensor for p in params for t in optimizer.state[p].values())
    assert all(optimizer.state[p]["step"].device.type == "cpu" for p in params)
    moments = [t for n, t in optimizer.state[params[4]].items() if n.startswith("exp_avg")]
    assert sum(t.nbytes for t in moments) == params[4].numel() * 2 * (1 + 4 / 256)


@pytest.mark.parametrize(
    ("options", "quantized", "dtype"),
    [
        ({}, [True, False, False], torch.float32),
        ({"min_quantized_numel": 100}, [True, True, False], torch.float32),
        ({"layout": "flat"}, [True, True, True], torch.float32),
        ({"state_bits": 32, "layout": "flat"}, [False] * 3, torch.float32),
        ({"state_bits": 16}, [False] * 3, torch.bfloat16),
    ],
)
def test_what_is_quantized(
    options: dict[str, Any], quantized: list[bool], dtype: torch.dtype
) -> None:
    params = parameters([(64, 64), (10, 10), (5000,)])
    optimizer = AdamW(params, **options)
    train(params, optimizer, 2)
    assert ["exp_avg_codes" in optimizer.state[p] for p in params] == quantized
    for p, codes in zip(params, quantized, strict=True):
        if not codes:
            assert optimizer.state[p]["exp_avg"].dtype is dtype
    if options.get("layout") == "flat" and quantized[2]:
        assert optimizer.state[params[2]]["exp_avg_absmax"].shape == (1, 20)


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    bits=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bf16=st.sampled_from(["remainder", "stochastic"]),
    blocksize=st.integers(1, 300),
    fewest=st.sampled_from([1, 64]),
)
def test_row_shards_are_cuts_of_the_whole(
    shape: list[int],
    cuts: list[int],
    bits: int,
    dtype: torch.dtype,
    bf16: str,
    blocksize: int,
    fewest: int,
) -> None:
    """The property all of it rests on, through the functions that every engine steps with."""
    whole = torch.nn.Parameter(tensor(tuple(shape), 0, dtype))
    options: dict[str, Any] = {
        "state_bits": bits, "bf16_params": bf16, "blocksize": blocksize,
        "min_quantized_numel": fewest,
    }  # fmt: skip
    optimizer = AdamW([whole], lr=0.1, **options)
    group = optimizer.param_groups[0]
    edges = sorted({0, shape[0], *(min(cut, shape[0]) for cut in cuts)})
    edges.insert(1, edges[1])  # an empty shard
    shards = [whole.detach()[a:b].clone() for a, b in itertools.pairwise(edges)]
    states = [new_state(shard, shape, group) for shard in shards]
    for step in range(3):
        train([whole], optimizer, 1, step)
        for shard, state, (a, b) in zip(shards, states, itertools.pairwise(edges), strict=True):
            assert whole.grad is not None
            first = a * math.prod(shape[1:])
            step_parameters([StepItem(shard, whole.grad[a:b], state, 0, first)], group)
    assert torch.equal(torch.cat(shards), whole.detach())
    for name, value in optimizer.state[whole].items():
        assert value.dtype is states[0][name].dtype
        if name == "step":
            assert all(state["step"] == value for state in states)
        else:
            assert torch.equal(torch.cat([state[name] for state in states]), value), name


def test_bf16_with_a_remainder_is_an_fp32_master() -> None:
    low = parameters([(64, 100), (77,)], torch.bfloat16)
    master = [torch.nn.Parameter(p.detach().float()) for p in low]
    a, b = AdamW(low, lr=1e-3), AdamW(master, lr=1e-3)
    for step in range(10):
        train(low, a, 1, step)
        for p, q in zip(low, master, strict=True):
            q.grad = p.grad.float()
        b.step()
        for p, q in zip(low, master, strict=True):
            remainder = a.state[p]["param_remainder"].view(torch.int16).squeeze(-1)
            bits = (p.detach().view(torch.int16).int() << 16) + remainder.int()
            assert torch.equal(bits.view(torch.float32), q.detach())
            assert torch.equal(p.detach(), q.detach().bfloat16()) or bool(
                ((p - q).abs() <= (q.abs() * 2.0**-8)).all()
            )


def test_stochastic_rounding_has_a_seed_and_no_state() -> None:
    def run(**options: Any) -> tuple[list[Any], AdamW]:
        params = parameters([(64, 100), (64, 100)], torch.bfloat16)
        with torch.no_grad():
            params[1].copy_(params[0])
        optimizer = AdamW(params, lr=1e-3, bf16_params="stochastic", **options)
        for step in range(4):
            for p in params:
                p.grad = tensor((64, 100), step, torch.bfloat16)
            optimizer.step()
        return params, optimizer

    first, optimizer = run(seed=5)
    torch.manual_seed(123)  # no generator of torch's is asked
    assert same(first, run(seed=5)[0])
    assert not same(first, run(seed=6)[0])
    assert "param_remainder" not in optimizer.state[first[0]]
    assert not torch.equal(first[0], first[1])  # the index of the parameter counts


def test_stochastic_rounding_has_no_drift() -> None:
    """Beside the exact master: the mean error is that of fair coins, though steps are tiny."""
    (rounded,), (exact,) = parameters([(256, 100)], torch.bfloat16), parameters([(256, 100)])
    with torch.no_grad():
        exact.copy_(rounded.float())
    start = exact.detach().clone()
    a, b = AdamW([rounded], lr=1e-4, bf16_params="stochastic"), AdamW([exact], lr=1e-4)
    steps = 20
    for step in range(steps):
        rounded.grad = tensor((256, 100), step, torch.bfloat16).abs()
        exact.grad = rounded.grad.float()
        a.step()
        b.step()
    # A coin that falls up with the right probability varies by at most half the spacing.
    spacing = torch.exp2(exact.detach().abs().log2().ceil() - 7).double()
    deviation = float((steps * spacing.square().sum()).sqrt()) / 2 / exact.numel()
    off = float((rounded.detach().double() - exact.detach().double()).mean())
    assert abs(off) < 5 * deviation
    # Rounding to nearest loses most of the way, and would be noticed.
    assert abs(float((exact.detach() - start).mean())) > 2 * 5 * deviation
    assert bool((start.bfloat16() == (start - 1e-4).bfloat16()).float().mean() > 0.9)


@pytest.mark.parametrize("bits", [8, 32])
def test_threads_do_not_show(bits: int) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters([(700, 300), (90_000,), (5, 40_000)], torch.bfloat16)
        optimizer = AdamW(params, state_bits=bits, max_grad_norm=1.0)
        train(params, optimizer, 3)
        states = [t for p in params for t in optimizer.state[p].values()]
        results.append(([p.detach() for p in params] + states, optimizer.last_grad_norm))
    assert results[0][1] == results[1][1]
    assert same(results[0][0], results[1][0])


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "channels_last": ((8, 16, 5, 7), lambda x: x.to(memory_format=torch.channels_last)),
    "transposed": ((80, 70), lambda x: x.t()),
    "every second": ((80, 70), lambda x: x[:, ::2]),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_need_not_be_contiguous(layout: str, dtype: torch.dtype) -> None:
    shape, view = LAYOUTS[layout]
    odd = torch.nn.Parameter(view(tensor(shape, 0, dtype)))
    even = torch.nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    assert not odd.is_contiguous()
    strides, address = odd.stride(), odd.data_ptr()
    a, b = AdamW([odd], min_quantized_numel=1), AdamW([even], min_quantized_numel=1)
    for step in range(3):
        even.grad = tensor(tuple(even.shape), step, dtype)
        odd.grad = torch.empty_like(odd).copy_(even.grad)
        a.step()
        b.step()
    assert (odd.stride(), odd.data_ptr()) == (strides, address)
    assert torch.equal(odd, even)
    assert all(torch.equal(a.state[odd][name], t) for name, t in b.state[even].items())


def test_scalars_and_empty_parameters() -> None:
    params = parameters([(), (0,), (0, 5), (5, 0), (1, 1)])
    for options in ({}, {"layout": "flat"}, {"state_bits": 16}):
        optimizer = AdamW(params, max_grad_norm=1.0, **options)
        before = params[0].detach().clone()
        train(params, optimizer, 2)
        assert params[0] != before
        assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_a_step_that_only_makes_states() -> None:
    """torch.distributed.checkpoint's way: zero gradients and lr 0 must change no bit."""
    params = parameters([(70, 70), (9,)])
    params += parameters([(70, 70)], torch.bfloat16)
    with torch.no_grad():
        params[0][0, :4] = torch.tensor([-0.0, math.inf, 1e-44, 3e38])
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=torch.tensor(0.0), max_grad_norm=1.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        kind = torch.int16 if p.dtype is torch.bfloat16 else torch.int32
        assert torch.equal(p.detach().view(kind), old.view(kind))
        assert optimizer.state[p]["step"] == 1
        for name, value in optimizer.state[p].items():
            zero = 127 if name == "exp_avg_codes" else 0
            assert name == "step" or bool((value == zero).all())
