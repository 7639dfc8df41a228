"""The gradient norm of parameters, and what clipping takes from it."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from feinwerk import optim, square_sum
from feinwerk.optim.device_norm import (
    Norm,
    clip_coefficient_on_device,
    norm_on_device,
    total_on_device,
)
from feinwerk.optim.gradient_norm import clip_coefficient, first_nonfinite, norm_of


def exact_norm(grads: list[torch.Tensor]) -> float:
    """To fp64's precision: a sum of exact squares that is rounded once, and a root."""
    return math.sqrt(math.fsum(x * x for g in grads for x in g.flatten().tolist()))


def test_the_norm_of_parameters() -> None:
    params = [torch.zeros(4, 3, requires_grad=True), torch.zeros(7, requires_grad=True)]
    params.append(torch.zeros(2, requires_grad=True))  # has no gradient
    assert optim.gradient_norm(params) == 0.0
    for seed, param in enumerate(params[:2]):
        generator = torch.Generator().manual_seed(seed)
        param.grad = torch.randn(param.shape, generator=generator) * 10.0**seed
    truth = exact_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(iter(params)) == pytest.approx(truth, rel=2.0**-51)
    assert params[0].grad is not None
    assert optim.gradient_norm(params[0]) == pytest.approx(exact_norm([params[0].grad]), rel=1e-15)
    reference = torch.nn.utils.get_total_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(params) == pytest.approx(float(reference), rel=1e-6)
    assert first_nonfinite(params) is None
    params[1].grad = torch.full((7,), math.nan)
    assert first_nonfinite(params) == 1


def test_the_clip_coefficient_is_torch_s() -> None:
    for norm in (0.0, 0.5, 1.0, 1.5, 1e10, math.inf):
        param = torch.zeros(1, requires_grad=True)
        param.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        expected = torch.tensor([norm]) * clip_coefficient(norm, 1.0)
        assert torch.allclose(param.grad, expected, rtol=1e-6, equal_nan=True)
    assert math.isnan(clip_coefficient(math.nan, 1.0))


def integer(limbs: torch.Tensor) -> int:
    return sum(limb << 30 * i for i, limb in enumerate(limbs.tolist()))


BORDERS = (0, 1, 2**30 - 2, 2**30 - 1, 2**30, 2**30 + 1, 2**33, 2**62, 2**63 - 1)


@given(
    st.lists(st.sampled_from(BORDERS) | st.integers(0, 2**30) | st.integers(0, 2**63 - 1),
             min_size=1, max_size=20)
)  # fmt: skip
@example([2**30 - 1] * 20)
@example([2**30] + [2**30 - 1] * 19)
@example([2**63 - 1] * 20)
def test_the_total_on_a_device_is_rounded_once(limbs: list[int]) -> None:
    for above in (0, 20 - len(limbs)):
        digits = torch.tensor([0] * above + limbs + [0] * (20 - above - len(limbs)))
        assert total_on_device(digits).item() == float(integer(digits))


@given(st.integers(2**52, 2**53 - 1), st.integers(0, 540), st.sampled_from((-1, 0, 1)))
def test_ties_of_the_total_go_to_even(mantissa: int, shift: int, beside: int) -> None:
    total = (2 * mantissa + 1 << shift) + beside
    digits = torch.tensor([total >> 30 * i & (1 << 30) - 1 for i in range(20)])
    assert integer(digits) == total
    assert total_on_device(digits).item() == float(total)


def test_a_norm_that_is_not_read_clips_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-20, 0.1, 1.0, 1e15):
        limbs = square_sum([torch.randn(40, 30, generator=generator) * size])
        # torch's root on the CPU is not always the nearest, as a GPU's is.
        norm = norm_on_device(limbs)
        assert norm.item() == pytest.approx(norm_of(limbs), rel=2.0**-51)
        known = torch.tensor(norm_of(limbs), dtype=torch.float64)
        for bound in (1e-3, 0.5, 1e9):
            on_device = clip_coefficient_on_device(known, bound).item()
            assert on_device == clip_coefficient(known.item(), bound)
    for value in (torch.inf, -torch.inf, torch.nan):
        limbs = square_sum([torch.tensor([1.0, value])])
        norms = norm_on_device(limbs).item(), norm_of(limbs)
        assert norms[0] == norms[1] or all(math.isnan(norm) for norm in norms)
        coefficient = clip_coefficient_on_device(norm_on_device(limbs), 1.0).item()
        assert math.isnan(coefficient) if math.isnan(value) else coefficient == 0


def test_a_norm_keeps_the_scale_of_its_step() -> None:
    scale = torch.tensor(4.0)
    norm = Norm(square_sum([torch.tensor([3.0, 4.0])]), scale)
    scale.fill_(1.0)
    assert norm.value() == 1.25
    assert norm.clip_coefficient(0.5).item() == clip_coefficient(1.25, 0.5)
