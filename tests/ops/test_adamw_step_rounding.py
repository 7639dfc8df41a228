"""adamw_step rounds bf16 parameters at random: unbiased, and by an address instead of a state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from feinwerk import philox, testing
from feinwerk.testing import assert_same_bits
from feinwerk.testing.adamw import StepCase, make_step


def rounding(values: torch.Tensor, step: int = 1, parameter: int = 0, **options: Any) -> StepCase:
    """A bf16 parameter whose fp32 result is values * (1 - 2^-9), whatever it is rounded to."""
    case = make_step((tuple(values.shape),), master="stochastic")
    case.params[0].copy_(values)
    case.grads[0].zero_()
    case.options |= {"lr": 2.0**-9, "weight_decay": 1.0, "steps": [step], **options}
    case.options["parameter_ids"] = [parameter]
    case.step()
    return case


def bf16_values(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, generator=generator).bfloat16()


@pytest.mark.parametrize("first", [0, 1, 63, 64, 1000, 2**33 + 5])
def test_the_word_of_an_element_decides(backend: str, first: int) -> None:
    # Once more, from the documentation: add the upper half of the word, cut off the lower 16 bits.
    values, seed, step, parameter = bf16_values(1200), torch.tensor(-7), 2**31 - 1, 2**31 - 2
    got = rounding(values, step, parameter, seed=seed, first_elements=[first]).params[0]
    exact = values.float() * torch.tensor(1 - 2.0**-9)
    words = philox.row_words(seed, (step << 32) + parameter, first, len(values))
    bits = exact.view(torch.int32).long() + (words >> 16)
    want = (bits >> 16 << 16).to(torch.int32).view(torch.float32)
    assert_same_bits(got.float(), want)
    below = (exact.view(torch.int32) & -65536).view(torch.float32)
    above = ((exact.view(torch.int32) + 65535) & -65536).view(torch.float32)
    assert ((got == below) | (got == above)).all()


def test_rounding_is_unbiased(backend: str) -> None:
    values = bf16_values(200_000)
    got = rounding(values).params[0]
    exact = values.double() * (1 - 2.0**-9)
    low = (exact.float().view(torch.int32) & 0xFFFF).double() / 65536
    step = testing.ulp(exact, torch.bfloat16)
    # Away from zero with probability low, each on its own: mean 0, variance low (1 - low).
    error = (got.double().abs() - exact.abs()) / step
    assert (error.abs() < 1).all()
    deviation = (low * (1 - low)).sum().sqrt()
    assert error.sum().abs() <= 5 * deviation
    # The same in each tenth of the probability.
    for tenth in range(10):
        part = (low * 10).long() == tenth
        deviation = (low * (1 - low))[part].sum().sqrt()
        assert error[part].sum().abs() <= 5 * deviation


def test_small_updates_are_not_lost(backend: str) -> None:
    # 400 updates of a sixteenth of a bf16 step each: to nearest, none would be seen.
    case = make_step(((4096,),), master="stochastic")
    case.params[0].fill_(1.0)
    case.grads[0].fill_(-1.0)
    case.options |= {"lr": 2.0**-11, "weight_decay": 0.0, "eps": 1e-30}
    for step in range(400):
        case.options["steps"] = [step + 1]
        case.step()
    moved = case.params[0].double() - 1
    # Each step is off by less than one bf16 step of [1, 2), 2^-7, with a mean of 0.
    deviation = math.sqrt(400) * 2.0**-7 / 2 / math.sqrt(4096)
    assert (moved.mean() - 400 * 2.0**-11).abs() <= 5 * deviation


def test_seed_step_parameter_and_element_each_change_the_words(backend: str) -> None:
    values = bf16_values(3000)
    base = rounding(values, seed=torch.tensor(5)).params[0]
    again = rounding(values, seed=torch.tensor(5)).params[0]
    assert_same_bits(base, again)
    others = [
        rounding(values, seed=torch.tensor(6)).params[0],
        rounding(values, seed=torch.tensor(5 + 2**32)).params[0],
        rounding(values, step=2, seed=torch.tensor(5)).params[0],
        rounding(values, parameter=1, seed=torch.tensor(5)).params[0],
        rounding(values, seed=torch.tensor(5), first_elements=[1]).params[0],
        rounding(values, seed=torch.tensor(5), first_elements=[2**32]).params[0],
    ]
    # Independent draws of probability q differ with probability 2 q (1 - q).
    exact = values.float() * torch.tensor(1 - 2.0**-9)
    q = (exact.view(torch.int32) & 0xFFFF).double() / 65536
    differ = 2 * q * (1 - q)
    deviation = (differ * (1 - differ)).sum().sqrt()
    for i, left in enumerate(others):
        for right in [base, *others[:i]]:
            assert ((left != right).sum() - differ.sum()).abs() <= 5 * deviation
