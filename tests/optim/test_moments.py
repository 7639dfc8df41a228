"""Moments to codes and back: the codes that adamw_step gives, rows that blocks never cross."""

from __future__ import annotations

import pytest
import torch

from feinwerk.codebook import dynamic_map
from feinwerk.ops.adamw_step import reference
from feinwerk.optim.moments import dequantize_moment, quantize_moment
from feinwerk.testing import assert_same_bits

SHAPES = [(7,), (1000,), (5, 300), (3, 4, 5), (4, 256), (0,), (0, 8), (3, 0), ()]


def values_of(shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randn(shape, generator=generator) * 1e-3
    values = values * 10.0 ** torch.randint(-9, 3, shape, generator=generator)
    return values if signed else values.square()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("blocksize", [32, 100, 256])
def test_codes_are_those_of_the_step(
    backend: str, name: str, shape: tuple[int, ...], blocksize: int
) -> None:
    signed = name == "exp_avg"
    values = values_of(shape, signed)
    codes, absmax = quantize_moment(name, values, blocksize)
    rows = shape[0] if len(shape) > 1 else 1
    assert codes.shape == values.shape
    if values.numel() == 0:
        return
    expected, most = torch.zeros_like(codes), torch.zeros_like(absmax)
    reference._encode(values, expected, most, blocksize, signed=signed)
    assert_same_bits(absmax, most)
    assert_same_bits(codes, expected)
    assert absmax.shape == (rows, -(-(values.numel() // rows) // blocksize))
    back = dequantize_moment(name, codes, absmax, blocksize)
    assert_same_bits(back, reference._decode(codes, absmax, blocksize, signed=signed))
    # Half the widest gap of the map is the most that rounding may cost.
    gap = dynamic_map(signed).diff().max().item()
    for row, row_back in zip(values.reshape(rows, -1), back.reshape(rows, -1), strict=True):
        for block, block_back in zip(row.split(blocksize), row_back.split(blocksize), strict=True):
            assert (block - block_back).abs().max() <= 0.51 * gap * block.abs().max()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_hard_values(backend: str, name: str) -> None:
    signed = name == "exp_avg"
    tiny, huge = 2.0**-140, 3e38
    blocks = [
        [0.0] * 4, [tiny, 0.0, tiny, 2 * tiny], [huge, 1.0, tiny, 0.0],
        [float("nan"), 1.0, 0.5, 0.0], [float("inf"), 1.0, 0.0, 0.0], [1.0, 1e-9, 1e-30, 0.0],
    ]  # fmt: skip
    values = torch.tensor(blocks).flatten()
    codes, absmax = quantize_moment(name, values, 4)
    expected, most = torch.zeros_like(codes), torch.zeros_like(absmax)
    reference._encode(values, expected, most, 4, signed=signed)
    assert_same_bits(codes, expected)
    assert_same_bits(absmax, most)
    if not signed:
        assert codes[-3] == 1, "a positive second moment must not be zero: it would blow the step"


def test_zero_is_exact_and_comes_back(backend: str) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        codes, absmax = quantize_moment(name, torch.zeros(3, 5))
        assert not dequantize_moment(name, codes, absmax).any()


def test_rejections() -> None:
    with pytest.raises(ValueError, match=r"quantize_moment: name must be one of 'exp_avg'"):
        quantize_moment("momentum", torch.ones(4))
    with pytest.raises(TypeError, match=r"x must be torch\.float32"):
        quantize_moment("exp_avg", torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="quantize_moment: blocksize must be at least 1, got 0"):
        quantize_moment("exp_avg", torch.ones(4), 0)
    with pytest.raises(ValueError, match="absmax must have 1 elements"):
        dequantize_moment("exp_avg", torch.zeros(4, dtype=torch.uint8), torch.ones(2))
