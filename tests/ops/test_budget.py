"""The error budget has teeth: one wrong code, one dropped block or one bad element fails it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from feinwerk import testing
from feinwerk.testing import assert_within_budget, make_weight, make_x, ulp


def fails(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **kwargs: torch.Tensor) -> bool:
    try:
        assert_within_budget(y, x, weight, **kwargs)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_one_wrong_code_fails(dtype: torch.dtype) -> None:
    weight = make_weight(16, 192)
    packed = weight.packed.clone()
    packed[5 * 96 + 40] ^= 0x80  # row 5: the high bit of one code
    wrong = dataclasses.replace(weight, packed=packed)
    x = make_x((8, 192), dtype)
    assert not fails(weight.linear(x), x, weight.dense(dtype))
    assert fails(wrong.linear(x), x, weight.dense(dtype))


def test_the_smallest_wrong_code_fails_in_fp32() -> None:
    weight = make_weight(16, 192)
    for bit in (1, 0x10):
        packed = weight.packed.clone()
        packed[5 * 96 + 40] ^= bit
        x = make_x((8, 192), torch.float32)
        wrong = dataclasses.replace(weight, packed=packed)
        assert fails(wrong.linear(x), x, weight.dense())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_one_dropped_block_fails(dtype: torch.dtype) -> None:
    weight = make_weight(16, 192)
    absmax = weight.absmax.clone()
    absmax[3 * 5 + 1] = 0
    x = make_x((8, 192), dtype)
    dropped = dataclasses.replace(weight, absmax=absmax).linear(x)
    assert fails(dropped, x, weight.dense(dtype))
    assert fails(dropped, x, weight.dense(dtype), scales=weight.scales())


def test_swapped_nibbles_fail() -> None:
    weight = make_weight(16, 192)
    swapped = dataclasses.replace(weight, packed=weight.packed << 4 | weight.packed >> 4)
    x = make_x((1, 192), torch.bfloat16)
    assert fails(swapped.linear(x), x, weight.dense(torch.bfloat16))


def test_the_next_blocks_scale_fails() -> None:
    weight = make_weight(16, 192)
    shifted = dataclasses.replace(weight, absmax=weight.absmax.roll(1))
    x = make_x((1, 192), torch.float32)
    assert fails(shifted.linear(x), x, weight.dense())


def test_nan_wrong_dtype_and_wrong_shape_fail() -> None:
    weight = make_weight(4, 64)
    x = make_x((2, 64), torch.float32)
    y = weight.linear(x)
    holed = y.clone()
    holed[1, 2] = torch.nan
    assert fails(holed, x, weight.dense())
    assert fails(y.bfloat16(), x, weight.dense())
    assert fails(y[:1], x, weight.dense())


def test_ulp() -> None:
    one = torch.tensor([1.0, -1.0, 1.5, 2.0, 0.0], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    expected = [eps, eps, eps, 2 * eps, torch.finfo(torch.bfloat16).smallest_normal * eps]
    assert ulp(one, torch.bfloat16).tolist() == expected
