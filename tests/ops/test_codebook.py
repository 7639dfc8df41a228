"""The tables: NF4's values and thresholds, and the dynamic map against bitsandbytes'."""

from __future__ import annotations

import pytest
import torch

from feinwerk.codebook import dynamic_map, nf4_codebook, nf4_thresholds
from feinwerk.testing import assert_same_bits


def test_nf4_values_are_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert_same_bits(nf4_codebook(), get_4bit_type("nf4", device="cpu"))


def test_cpu_thresholds_are_the_fp32_midpoints() -> None:
    values = nf4_codebook()
    assert_same_bits(nf4_thresholds("cpu"), (values[:-1] + values[1:]) / 2)


def test_cuda_thresholds_are_one_ulp_away_at_most() -> None:
    bits = [nf4_thresholds(rule).view(torch.int32) for rule in ("cpu", "cuda")]
    assert (bits[0] - bits[1]).abs().tolist() == [1, *[0] * 7, 1, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert_same_bits(dynamic_map(signed), create_dynamic_map(signed=signed))


def test_dynamic_map_is_a_fresh_ascending_tensor() -> None:
    first = dynamic_map()
    assert first.diff().gt(0).all()
    assert first[127] == 0
    first.zero_()
    assert dynamic_map()[255] == 1
