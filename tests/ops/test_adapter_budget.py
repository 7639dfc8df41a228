"""The adapters' error budget has teeth: one wrong element of anything, or one step left out, fails.

Each test computes something slightly else than the truth says, and expects the check to see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from feinwerk import testing
from feinwerk.testing import assert_same_bits
from feinwerk.testing.adapters import Adapter, AdapterCase, make_adapters

# Names of what must be seen to be wrong, when the call differs from the case like this.
WRONG: dict[str, tuple[Callable[[AdapterCase], dict[str, Any]], set[str]]] = {
    "one element of A": (lambda c: {"adapters": edited(c, "A")}, {"y", "x", "B0"}),
    "one element of B": (lambda c: {"adapters": edited(c, "B")}, {"y", "x", "A0"}),
    "the scaling": (lambda c: {"adapters": scaled(c)}, {"y", "x", "A0", "B0"}),
    "the last column of A": (lambda c: {"adapters": edited(c, "A", 0.0)}, {"y", "x"}),
    "the sign of a bias": (lambda c: {"bias": flipped(c.bias)}, {"y"}),
    "another mask": (lambda c: {"seed": c.seed + 1}, {"y", "x", "A0", "B0"}),
    "one element of x": (lambda c: {"x": flipped(c.x)}, {"y", "A0", "B0"}),
    "one element of grad_y": (lambda c: {"grad_y": flipped(c.grad_y)}, {"x", "A0", "B0", "bias"}),
}


def flipped(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] *= -1
    return value


def edited(case: AdapterCase, name: str, factor: float = -1.0) -> tuple[Adapter, ...]:
    value = getattr(case.adapters[0], name).clone()
    if factor == 0.0:
        value[:, -1] = 0
    else:
        value.view(-1)[-1] *= factor
    return (dataclasses.replace(case.adapters[0], **{name: value}),)


def scaled(case: AdapterCase) -> tuple[Adapter, ...]:
    one = case.adapters[0]
    return (dataclasses.replace(one, scaling=one.scaling * (1 + 2.0**-5)),)


def beyond(case: AdapterCase, got: dict[str, torch.Tensor]) -> set[str]:
    """The names that the case's budget rejects."""
    rejected = set()
    for name, value in got.items():
        try:
            case.check({name: value})
        except AssertionError:
            rejected.add(name)
    return rejected


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_seen(what: str, dtype: torch.dtype, dora: bool) -> None:
    change, seen = WRONG[what]
    case = make_adapters(16, 96, 6, (3,), dtype=dtype, dora=(dora,), bias=dtype, dropout_p=0.2)
    assert not beyond(case, case.run())
    assert beyond(case, dataclasses.replace(case, **change(case)).run()) >= seen


def test_a_gain_off_by_a_thousandth_is_seen() -> None:
    for dropout_p in (0.0, 0.2):
        case = make_adapters(16, 96, 6, (3,), dora=(True,), dropout_p=dropout_p)
        one = case.adapters[0]
        assert one.magnitude is not None
        wrong = (dataclasses.replace(one, magnitude=one.magnitude * 1.001),)
        got = dataclasses.replace(case, adapters=wrong).run()
        assert beyond(case, got) >= {"y", "x", "A0", "B0"}


def test_a_norm_of_the_base_alone_is_seen() -> None:
    case = make_adapters(16, 96, 6, (3,), dora=(True,), dtype=torch.bfloat16)
    got = case.run(weight_norm=case.base_norm())
    assert beyond(case, got) >= {"y", "x", "A0", "B0", "magnitude0"}


def test_dora_s_two_products_are_told_apart() -> None:
    # Under dropout PEFT multiplies W with x once and with dropout(x) for the gain's part.
    case = make_adapters(16, 96, 6, (3,), dora=(True,), dropout_p=0.2)
    factor = case.dropout_factor().float()
    dropped = dataclasses.replace(case, x=case.x * factor, dropout_p=0.0, seed=None)
    assert beyond(case, {"y": dropped.run()["y"]}) == {"y"}


def test_an_adapter_taken_for_its_neighbour_is_seen() -> None:
    case = make_adapters(16, 96, 6, (3, 3), dora=(False, True), index=(0, 1, 0, 1, -1, 1))
    wrong = dataclasses.replace(case, index=torch.tensor([0, 1, 0, 1, -1, 0]))
    assert beyond(case, wrong.run()) >= {"y", "x", "A0", "A1", "B0", "B1", "magnitude1"}


def test_the_truth_is_not_the_reference_s_derivation() -> None:
    # The fp64 truth against the definition, written out: PEFT's formulas with our mask.
    case = make_adapters(9, 40, 5, (3,), base="fp32", dora=(True,), dropout_p=0.3)
    one, W, x = case.adapters[0], case.dense().double(), case.x.double()
    A, B, factor = one.A.double(), one.B.double(), case.dropout_factor()
    assert one.magnitude is not None
    gain = one.magnitude.double() / (W + one.s * B @ A).norm(dim=1)
    dropped = x * factor
    want = x @ W.t() + (gain - 1) * (dropped @ W.t()) + gain * one.s * (dropped @ A.t() @ B.t())
    truth = case.bounds()["y"][0]
    assert (truth - want).abs().max() <= 1e-13 * want.abs().max()


def test_the_budget_is_tight() -> None:
    # In fp32 the sum's rounding; in bf16 and fp16 little more than the one rounding at the end.
    limits = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
    for dtype, limit in limits.items():
        case = make_adapters(64, 576, 17, (16,), dtype=dtype, dora=(True,), bias=dtype)
        for name, (truth, budget) in case.bounds().items():
            assert budget.max() <= limit * truth.abs().max(), name


def test_cases_are_the_same_on_every_backend(backend: str) -> None:
    case = make_adapters.__wrapped__(9, 40, 5, (3,), base="nested", dora=(True,))
    again = make_adapters(9, 40, 5, (3,), base="nested", dora=(True,))
    for name, value in case.leaves().items():
        assert_same_bits(value, again.leaves()[name], name)
    assert_same_bits(case.dense(), again.dense())
