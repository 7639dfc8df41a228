"""adamw_step: values against fp64, and the same bits on every backend for every combination."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import adamw_step, testing
from feinwerk.codebook import dynamic_map
from feinwerk.testing import assert_within, use_backend
from feinwerk.testing.adamw import MASTERS, STATE_DTYPES, StepCase, make_step, spread
from feinwerk.testing.interpreted import some

BLOCKSIZES = (1, 7, 64, 256, 2048)
# Empty, one element, one row, odd, rows shorter and longer than a block and than what a kernel
# holds at once, many short blocks, three dimensions.
SHAPES = (
    (0,), (0, 5), (5, 0), (), (1,), (1, 1), (33,), (1025,), (7, 1), (70, 3), (3, 63), (3, 64),
    (5, 257), (2, 3, 100), (4, 1, 7), (3, 0, 2), (2, 2100), (3, 5000), (17, 16),
    (300, 3), (260, 8), (40, 40),
)  # fmt: skip
STEPS = 3
KINDS = ("normal", "special")


def special(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Zeros, denormals, huge numbers, infinities and NaN beside ordinary ones."""
    odd = torch.tensor([0.0, -0.0, 1e-45, -3e-42, 1e-30, 1e18, -1e20, 3e38, torch.inf, torch.nan])
    x = torch.randn(shape, generator=generator)
    chosen = odd[torch.randint(len(odd), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.02, chosen, x)


def run(
    master: str, grads: torch.dtype, states: torch.dtype, blocksize: int, kind: str
) -> list[StepCase]:
    """The case after each of some steps."""
    case = make_step(SHAPES, master=master, grads=grads, states=states, blocksize=blocksize)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        if kind == "special":
            for tensor in (*case.params, *case.grads):
                tensor.copy_(special(tensor.shape, generator))
        case.step()
        found.append(case.copy())
        case.advance(step)
    return found


@functools.cache
def reference_run(*arguments: Any) -> list[StepCase]:
    with use_backend("reference"):
        return run(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("grads", testing.DTYPES, ids=str)
@pytest.mark.parametrize("master", MASTERS)
def test_same_bits_on_every_backend(
    backend: str, master: str, grads: torch.dtype, states: torch.dtype, kind: str
) -> None:
    # Of the reference it shows that two runs agree.
    sizes = BLOCKSIZES if states is torch.uint8 and backend != "reference" else (256,)
    for blocksize in some(sizes, 2):
        arguments = (master, grads, states, blocksize, kind)
        both = zip(run(*arguments), reference_run(*arguments), strict=True)
        for step, (got, want) in enumerate(both):
            got.assert_same(want, f"blocksize {blocksize} step {step}")


def check_step(case: StepCase, **changes: Any) -> None:
    """One step of fp32 parameters, each value within the fp64 truth's bound."""
    case.options.update(changes)
    before = case.copy()
    case.step()
    for i, param in enumerate(case.params):
        exact = before.exact(i)
        assert_within(param, exact.param, exact.param_error, torch.float32, f"param {i}")
        moments = {
            "exp_avg": (case.exp_avgs[i], exact.exp_avg, exact.exp_avg_error),
            "exp_avg_sq": (case.exp_avg_sqs[i], exact.exp_avg_sq, exact.exp_avg_sq_error),
        }
        for name, (actual, truth, error) in moments.items():
            if actual.dtype is torch.bfloat16:
                # From fp32 to bf16: half of a step of the larger of the two.
                error = error + testing.ulp(truth.abs() + error, torch.bfloat16) / 2
            if actual.dtype is not torch.uint8:
                assert_within(actual, truth, error, actual.dtype, f"{name} {i}")


@pytest.mark.parametrize("grads", testing.DTYPES, ids=str)
@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
def test_values(backend: str, states: torch.dtype, grads: torch.dtype) -> None:
    case = make_step(SHAPES, states=states, grads=grads, blocksize=64)
    for step in some(range(12), 3):
        check_step(case)
        case.advance(step)


OPTIONS: dict[str, dict[str, Any]] = {
    "no momentum": {"beta1": 0.0, "beta2": 0.0},
    "long memory": {"beta1": 0.99, "beta2": 1 - 1e-7},
    "large eps": {"eps": 1.0},
    "lr 0": {"lr": 0.0},
    "no decay": {"weight_decay": 0.0},
    "decay alone": {"lr": 0.5, "weight_decay": 1.5},
    "maximize": {"maximize": True},
    "clip": {"clip_coef": torch.tensor(0.37)},
    "scaled": {"grad_scale": torch.tensor([1000.0])},
    "all": {
        "clip_coef": torch.tensor([0.37], dtype=torch.float64),
        "grad_scale": torch.tensor(65536.0, dtype=torch.float16).clamp(max=60000),
        "found_inf": torch.zeros(1),
        "maximize": True,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, name: str) -> None:
    options = dict(OPTIONS[name])
    case = make_step(((5, 300), (33,)))
    for step in range(5):
        check_step(case, **options)
        case.advance(step)
    coded = make_step(((5, 300), (33,)), states=torch.uint8, master="stochastic")
    with use_backend("reference"):
        want = coded.copy()
        want.step(**options)
    coded.step(**options)
    coded.assert_same(want)


def test_the_bound_notices_errors_of_a_few_roundings(backend: str) -> None:
    case = make_step(((5, 300),))
    for step in range(3):
        case.step()
        case.advance(step)
    before = case.copy()
    case.step()
    exact = before.exact(0)
    for name, tensor in (
        ("param", case.params[0]),
        ("exp_avg", case.exp_avgs[0]),
        ("exp_avg_sq", case.exp_avg_sqs[0]),
    ):
        truth, error = getattr(exact, name), getattr(exact, f"{name}_error")
        assert_within(tensor, truth, error, torch.float32)
        with pytest.raises(AssertionError, match="beyond the error budget"):
            assert_within(tensor * (1 + 2.0**-19), truth, error, torch.float32)


def test_as_near_to_fp64_as_torch(backend: str) -> None:
    # A whole trajectory: twice torch's own error and half an ulp, as for the products.
    case = make_step(((40, 30),))
    case.options |= {"steps": [1], "lr": 1e-3}
    runs = {}
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(case.params[0].to(dtype))
        runs[dtype] = (
            parameter,
            torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1, foreach=False),
        )
    for step in range(60):
        for parameter, optimizer in runs.values():
            parameter.grad = case.grads[0].to(parameter.dtype)
            optimizer.step()
        case.step()
        case.advance(step)
    truth = runs[torch.float64][0].detach()
    torch_error = (runs[torch.float32][0].detach().double() - truth).abs().max()
    budget = 2 * torch_error + testing.ulp(truth, torch.float32)
    assert_within(case.params[0], truth, budget, torch.float32)


@pytest.mark.parametrize("master", MASTERS[1:])
@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
def test_bf16_parameters(backend: str, states: torch.dtype, master: str) -> None:
    case = make_step(((5, 300), (33,)), master=master, states=states)
    for step in range(6):
        before = case.copy()
        case.step()
        for i, param in enumerate(case.params):
            exact = before.exact(i)
            truth, error = exact.param, exact.param_error
            if master == "stochastic":
                # One of the two neighbours.
                error = error + testing.ulp(truth.abs() + error, torch.bfloat16)
                assert_within(param, truth, error, torch.bfloat16)
                continue
            joined = case.master(i)
            assert_within(joined, truth, error, torch.float32, "master")
            half = testing.ulp(joined.double(), torch.bfloat16) / 2
            assert_within(param, joined.double(), half, torch.bfloat16, "upper half")
        case.advance(step)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_codes_are_the_nearest(backend: str, blocksize: int) -> None:
    case = make_step(SHAPES, states=torch.uint8, blocksize=blocksize)
    for step in some(range(6), 2):
        before = case.copy()
        case.step()
        for i, param in enumerate(case.params):
            if param.numel() == 0:
                continue
            exact = before.exact(i)
            check_codes(
                case.exp_avgs[i], case.exp_avg_absmaxes[i], exact.exp_avg, exact.exp_avg_error,
                True, blocksize,
            )  # fmt: skip
            check_codes(
                case.exp_avg_sqs[i], case.exp_avg_sq_absmaxes[i], exact.exp_avg_sq,
                exact.exp_avg_sq_error, False, blocksize,
            )  # fmt: skip
        case.advance(step)


def check_codes(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    truth: torch.Tensor,
    error: torch.Tensor,
    signed: bool,
    blocksize: int,
) -> None:
    """The absmax is the block's largest magnitude; values lie between their codes' midpoints."""
    scale = spread(absmax, codes, blocksize).double()
    assert (truth.abs() <= scale + error).all()
    at_the_top = (truth.abs() + error >= scale).to(torch.float32)
    counted = torch.zeros_like(absmax.view(-1))
    rows = codes.shape[0] if codes.dim() > 1 else 1
    length = codes.numel() // rows
    block = torch.arange(length) // blocksize + torch.arange(rows)[:, None] * (
        -(-length // blocksize)
    )
    counted.index_add_(0, block.flatten(), at_the_top.flatten())
    assert (counted >= 1).all()
    values = dynamic_map(signed).double()
    edges = torch.cat([values[:1] * 2 - 1, (values[:-1] + values[1:]) / 2, values[-1:] * 2])
    low, high = edges[codes.long()] * scale, edges[codes.long() + 1] * scale
    if not signed:
        # Codes 0 and 1: a positive value never takes code 0.
        assert ((codes > 0) == (truth > 0)).all()
        low = torch.where(codes == 1, 0.0, low)
    # Scaling, and the midpoints themselves, are rounded to fp32.
    slack = error + 4 * 2.0**-24 * truth.abs() + 2.0**-24 * low.abs()
    assert (truth >= low - slack).all()
    assert (truth <= high + slack).all()


@pytest.mark.parametrize("master", MASTERS)
def test_many_steps(backend: str, master: str) -> None:
    if backend != "reference":
        many_steps(master).assert_same(reference_steps(master))


@functools.cache
def reference_steps(master: str) -> StepCase:
    with use_backend("reference"):
        return many_steps(master)


def many_steps(master: str) -> StepCase:
    case = make_step(((9, 129), (40,)), master=master, states=torch.uint8, blocksize=64)
    for step in some(range(200), 30):
        case.step()
        case.advance(step)
        if step % 7 == 0:
            for grad in case.grads:
                grad[..., ::3] = 0
    return case


hyper = st.floats(0, 1, exclude_max=True, width=32)


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
    blocksize=st.integers(1, 1500) | st.just(2**62),
    master=st.sampled_from(MASTERS),
    grads=st.sampled_from(testing.DTYPES),
    states=st.sampled_from(STATE_DTYPES),
    beta1=hyper,
    beta2=hyper,
    eps=st.floats(2.0**-100, 1.0),
    lr=st.floats(0, 10),
    weight_decay=st.floats(0, 1),
    maximize=st.booleans(),
    clip=st.none() | st.floats(0, 4, width=32),
    step=st.integers(1, 2**31 - 2),
    seed=st.integers(0, 1000),
)
def test_any_arguments(
    backend: str,
    shape: tuple[int, ...],
    blocksize: int,
    master: str,
    grads: torch.dtype,
    states: torch.dtype,
    clip: float | None,
    step: int,
    seed: int,
    **scalars: Any,
) -> None:
    if blocksize > 2**32:  # one block a row: a case of that size is the same with any large one
        blocksize = max(1, *shape, 1) ** 3 + 1
    case = make_step(
        (shape, (3, 50)), master=master, grads=grads, states=states, blocksize=blocksize, seed=seed
    )
    case.options |= {**scalars, "steps": [step, 1]}
    case.options["clip_coef"] = None if clip is None else torch.tensor(clip)
    with use_backend("reference"):
        want = case.copy()
        want.step()
        want.advance(seed)
        want.step()
    case.step()
    case.advance(seed)
    case.step()
    case.assert_same(want)


def test_blocksizes_of_any_size(backend: str) -> None:
    case = make_step(((6, 500),), states=torch.uint8, blocksize=500)
    for blocksize in (501, 2**40, 2**63 - 1):
        again = case.copy()
        again.step(blocksize=blocksize)
        want = case.copy()
        want.step()
        again.assert_same(want)


def test_gradients_in_any_order_of_memory(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    turned = torch.randn(300, 5, generator=generator).t()
    spread_out = torch.randn(5, 600, generator=generator)[:, ::2]
    one = torch.randn(1, generator=generator).expand(5, 300)
    for grad in (turned, spread_out, one):
        for states in STATE_DTYPES:
            case = make_step(((5, 300),), states=states)
            want = case.copy()
            case.grads[0], want.grads[0] = grad, grad.contiguous()
            case.step()
            want.step()
            want.grads[0] = grad
            case.assert_same(want)


def test_an_empty_list(backend: str) -> None:
    adamw_step([], [], [], [], steps=[], lr=0.1)
