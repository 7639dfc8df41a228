"""What adamw_step promises beside values: guards, skipping, shards, threads, the dispatcher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from feinwerk import adamw_step
from feinwerk.codebook import dynamic_map
from feinwerk.testing import assert_same_bits, use_backend
from feinwerk.testing.adamw import MASTERS, STATE_DTYPES, StepCase, make_step

OP = torch.ops.feinwerk.adamw_step.default


def coded(grad: torch.Tensor, **options: Any) -> StepCase:
    """An fp32 parameter of ones with codes and this gradient."""
    case = make_step((tuple(grad.shape),), states=torch.uint8, blocksize=4096)
    case.params[0].fill_(1.0)
    case.grads[0] = grad
    case.options |= {"lr": 1e-3, "weight_decay": 0.0, "steps": [1], **options}
    return case


def test_a_positive_second_moment_never_takes_the_code_of_zero(backend: str) -> None:
    # One element so large that the others are below the lowest midpoint, and some whose quotient
    # even underflows.
    for size in (20, 37, 3000):
        grad = torch.full((size,), 1e-20)
        grad[::3] = 1e-4
        grad[1::5] = 0
        grad[-1] = 1e12
        case = coded(grad)
        case.step()
        codes = case.exp_avg_sqs[0]
        assert torch.equal(codes == 0, grad == 0)
        assert (codes[:-1][grad[:-1] > 0] == 1).all()
        assert codes[-1] == 255


def test_no_blow_up_where_codes_would_be_zero(backend: str) -> None:
    # A large gradient hides its neighbours' second moment: rounded to zero, their next steps would
    # be m / eps, some 1e5 times lr.
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(256, generator=generator) * 1e-3
    grad[7] = 1e4
    case = coded(grad, lr=1.0)
    for step in range(5):
        case.options["steps"] = [step + 1]
        before = case.params[0].clone()
        case.step()
        moved = (case.params[0] - before).abs()
        moved[7] = 0
        # The first step is lr for everyone, to a few roundings; the next ones divide by a second
        # moment that was rounded up.
        assert moved.max() <= 1 + 2.0**-20
        grad[7] = 1e-3


def test_nan_stays_with_its_element(backend: str) -> None:
    for states in STATE_DTYPES:
        case = make_step(((2, 40),), states=states, blocksize=16)
        case.step()
        clean = case.copy()
        case.grads[0][0, 5] = torch.nan
        case.step()
        clean.step()
        assert case.params[0].isnan().nonzero().tolist() == [[0, 5]]
        others = ~case.params[0].isnan()
        assert_same_bits(case.params[0][others], clean.params[0][others])
        if states is torch.uint8:
            assert (case.exp_avgs[0][0, 5], case.exp_avg_sqs[0][0, 5]) == (127, 0)
            assert all(absmax.isfinite().all() for absmax in case.exp_avg_absmaxes)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e30], ids=str)
def test_an_overflow_makes_its_block_start_afresh(backend: str, value: float) -> None:
    for blocksize in (16, 4096):
        case = make_step(((3, 1500),), states=torch.uint8, blocksize=blocksize)
        case.step()
        clean = case.copy()
        case.grads[0][1, 5] = value
        case.step()
        clean.step()
        block = torch.zeros(3, 1500, dtype=torch.bool)
        block[1, :blocksize] = True
        for name, zero in (("exp_avgs", 127), ("exp_avg_sqs", 0)):
            codes, others = getattr(case, name)[0], getattr(clean, name)[0]
            assert (codes[block] == zero).all()
            assert_same_bits(codes[~block], others[~block])
        for absmax in (case.exp_avg_absmaxes[0], case.exp_avg_sq_absmaxes[0]):
            assert absmax.view(3, -1)[1, 0] == 0
            assert absmax.isfinite().all()
        # A finite gradient leaves every parameter finite, in this step and the next ones.
        case.grads[0].normal_(generator=torch.Generator().manual_seed(1))
        case.step()
        assert case.params[0].isnan().sum() == (0 if math.isfinite(value) else 1)


def test_zero_gradients_leave_zero_states(backend: str) -> None:
    for states in STATE_DTYPES:
        case = make_step(((3, 33),), states=states)
        before = case.copy()
        case.grads[0].zero_()
        case.step()
        for name in ("exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes"):
            for left, right in zip(getattr(case, name), getattr(before, name), strict=True):
                assert_same_bits(left, right)
        decayed = before.params[0] * torch.tensor(1 - 1e-2 * 0.1)
        assert_same_bits(case.params[0], decayed)


@pytest.mark.parametrize("found", [1.0, -2.0, torch.nan, torch.inf], ids=str)
def test_found_inf_leaves_the_step_out(backend: str, found: float) -> None:
    for master in MASTERS:
        case = make_step(((3, 33), (5,)), master=master, states=torch.uint8)
        before = case.copy()
        case.step(found_inf=torch.tensor([found]))
        case.assert_same(before)


def test_scale_and_clip_are_one_factor(backend: str) -> None:
    # Powers of two change no rounding: the gradient may as well have been scaled before.
    case = make_step(((3, 333),), states=torch.uint8)
    scaled = case.copy()
    scaled.grads[0].mul_(-1024 * 4)
    case.step()
    scaled.step(
        grad_scale=torch.tensor(1024.0), clip_coef=torch.tensor([0.25]).double(), maximize=True
    )
    scaled.grads = case.grads
    case.assert_same(scaled)


def test_default_ids_and_elements(backend: str) -> None:
    case = make_step(((3, 50), (7,)), master="stochastic")
    del case.options["parameter_ids"]
    other = case.copy()
    case.step()
    other.step(parameter_ids=[0, 1], first_elements=[0, 0])
    case.assert_same(other)


# Shards and threads


@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("master", MASTERS)
def test_row_shards_have_the_bits_of_the_whole(
    backend: str, master: str, states: torch.dtype
) -> None:
    rows, cols = 23, 150
    whole = make_step(((rows, cols),), master=master, states=states, blocksize=64)
    shards = []
    for begin, end in ((0, 1), (1, 9), (9, 9), (9, 22), (22, 23)):
        parts = {
            name: [t.view(rows, -1)[begin:end].clone() for t in tensors]
            for name, tensors in whole.tensors.items()
        }
        options = {**whole.options, "first_elements": [begin * cols]}
        shards.append((begin, end, StepCase(**parts, options=options)))
    for step in range(3):
        whole.step()
        whole.advance(step)
        for begin, end, shard in shards:
            shard.step()
            shard.options["steps"] = whole.options["steps"]
            shard.grads[0].copy_(whole.grads[0][begin:end])
    for name, tensors in whole.tensors.items():
        for i, tensor in enumerate(tensors):
            joined = torch.cat([getattr(shard, name)[i] for _, _, shard in shards])
            assert_same_bits(joined, tensor.view(rows, -1), name)


@pytest.mark.parametrize("master", MASTERS)
def test_a_shard_in_place_touches_nothing_else(backend: str, master: str) -> None:
    for states in STATE_DTYPES:
        whole = make_step(((23, 150),), master=master, states=states, blocksize=64)
        before, alone = whole.copy(), whole.copy()
        alone.step()
        views = {n: [t.view(23, -1)[5:9] for t in tensors] for n, tensors in whole.tensors.items()}
        options = {**whole.options, "first_elements": [5 * 150]}
        StepCase(**views, options=options).step()
        for name, tensors in whole.tensors.items():
            for i, tensor in enumerate(tensors):
                rows = tensor.view(23, -1)
                assert_same_bits(rows[5:9], getattr(alone, name)[i].view(23, -1)[5:9], name)
                kept = torch.cat([rows[:5], rows[9:]])
                untouched = getattr(before, name)[i].view(23, -1)
                assert_same_bits(kept, torch.cat([untouched[:5], untouched[9:]]), name)


@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("master", MASTERS)
def test_threads_change_nothing(backend: str, master: str, states: torch.dtype) -> None:
    shapes = ((50, 700), (40,), (3, 5), (40_000,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        case = make_step(shapes, master=master, states=states, blocksize=200)
        case.step()
        results.append(case)
    for result in results[1:]:
        result.assert_same(results[0])


def test_one_call_for_a_list_is_a_call_for_each(backend: str) -> None:
    shapes = ((3, 50), (0,), (7,), (2, 2, 90))
    for master in MASTERS:
        together = make_step(shapes, master=master, states=torch.uint8)
        apart = together.copy()
        together.step()
        for i in range(len(shapes)):
            one = {name: tensors[i : i + 1] for name, tensors in apart.tensors.items()}
            options = {
                name: [value[i]] if isinstance(value, list) else value
                for name, value in apart.options.items()
            }
            StepCase(**one, options=options).step()
        together.assert_same(apart)


# The dispatcher


@pytest.mark.parametrize("master", MASTERS)
def test_opcheck(backend: str, master: str) -> None:
    for states in STATE_DTYPES:
        case = make_step(((3, 50), (7,)), master=master, states=states)
        options = dict(case.options)
        steps, ids = options.pop("steps"), options.pop("parameter_ids", [0, 1])
        seed = options.pop("seed", None)
        arguments = (*case.tensors.values(), steps, ids, [0, 4], seed, torch.tensor(0.5))
        torch.library.opcheck(OP, arguments, options)


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(case_tensors: dict[str, list[torch.Tensor]], step: int, seed: Any) -> Any:
        adamw_step(
            **case_tensors, steps=[step, step + 2], lr=0.01, seed=seed, clip_coef=torch.ones(1) / 2
        )
        return case_tensors["params"][0] * 2

    for master in MASTERS:
        case = make_step(((3, 50), (7,)), master=master, states=torch.uint8)
        plain = case.copy()
        seed = case.options.get("seed")
        for step in range(1, 4):
            result = compiled(case.tensors, step, seed)
            adamw_step(
                **plain.tensors, steps=[step, step + 2], lr=0.01, seed=seed,
                clip_coef=torch.tensor([0.5]),
            )  # fmt: skip
            case.assert_same(plain)
            assert_same_bits(result, plain.params[0] * 2)


def test_everything_written_has_a_new_version(backend: str) -> None:
    case = make_step(((3, 50), (7,)), master="remainder", states=torch.uint8)
    before = {name: [t._version for t in tensors] for name, tensors in case.tensors.items()}
    case.step()
    for name, tensors in case.tensors.items():
        changed = [t._version > old for t, old in zip(tensors, before[name], strict=True)]
        assert changed == [name != "grads"] * 2, name
    parameter = torch.nn.Parameter(torch.ones(3))
    product = (parameter * parameter).sum()
    adamw_step([parameter], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], steps=[1], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_parameters_that_require_grad(backend: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    (parameter * 3).sum().backward()
    moments = [torch.zeros(3, 4)], [torch.zeros(3, 4)]
    adamw_step([parameter], [parameter.grad], *moments, steps=[1], lr=0.1)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not any(m[0].requires_grad for m in moments)


def test_under_another_default_dtype_and_device(backend: str) -> None:
    case = make_step(((3, 50),), master="stochastic", states=torch.uint8)
    want = case.copy()
    options = {"clip_coef": torch.tensor(0.3), "grad_scale": torch.tensor(3.0)}
    want.step(**options)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            case.step(**options)
    finally:
        torch.set_default_dtype(torch.float32)
    case.assert_same(want)


def test_new_codes_mean_zero() -> None:
    assert dynamic_map(True)[127] == 0
    assert dynamic_map(False)[0] == 0


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    shape = (2**16, 2**15 + 3)
    param = torch.empty(shape, device="meta")
    codes = torch.empty(shape, device="meta", dtype=torch.uint8)
    absmax = torch.empty(2**16, 2**7 + 1, device="meta")
    adamw_step([param], [param], [codes], [codes], [absmax], [absmax], steps=[1], lr=0.1)
    with use_backend("reference"), pytest.raises(ValueError, match="must have 8454144 elements"):
        adamw_step([param], [param], [codes], [codes], [absmax], [absmax[1:]], steps=[1], lr=0.1)
