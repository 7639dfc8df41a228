"""Moments to codes and back: the codes that adamw_step gives, rows that blocks never cross."""

from __future__ import annotations

import pytest
import torch

from feinwerk._checks import rows_of
from feinwerk.codebook import dynamic_map
from feinwerk.ops import adamw_step
from feinwerk.optim.moments import dequantize_moment, quantize_moment
from feinwerk.testing import assert_same_bits

SHAPES = [(7,), (1000,), (5, 300), (3, 4, 5), (4, 256), (0,), (0, 8), (3, 0), ()]


def encoded_by_the_step(
    gradient: torch.Tensor, blocksize: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and absmax that a step without memory leaves: of the gradient and of its square."""
    rows, row = rows_of(gradient.shape)
    blocks = -(-row // blocksize)
    codes = [torch.full(gradient.shape, zero, dtype=torch.uint8) for zero in (127, 0)]
    absmax = [torch.zeros(rows, blocks) for _ in range(2)]
    adamw_step(
        [torch.zeros_like(gradient)], [gradient], [codes[0]], [codes[1]], [absmax[0]], [absmax[1]],
        steps=[1], lr=0.0, beta1=0.0, beta2=0.0, blocksize=blocksize,
    )  # fmt: skip
    return {"exp_avg": (codes[0], absmax[0]), "exp_avg_sq": (codes[1], absmax[1])}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 100, 256])
def test_codes_are_those_of_the_step(backend: str, shape: tuple[int, ...], blocksize: int) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    gradient = torch.randn(shape, generator=generator) * 1e-3
    gradient = gradient * 10.0 ** torch.randint(-9, 3, shape, generator=generator)
    expected = encoded_by_the_step(gradient, blocksize)
    for name, values in (("exp_avg", gradient), ("exp_avg_sq", gradient * gradient)):
        codes, absmax = quantize_moment(name, values, blocksize)
        assert_same_bits(codes, expected[name][0])
        assert_same_bits(absmax, expected[name][1])
        back = dequantize_moment(name, codes, absmax, blocksize)
        # Half the widest gap of the map is the most that rounding may cost.
        gap = dynamic_map(name == "exp_avg").diff().max().item()
        rows, _ = rows_of(shape)
        if values.numel() == 0:
            assert back.shape == values.shape
            continue
        for row, row_back in zip(values.reshape(rows, -1), back.reshape(rows, -1), strict=True):
            pairs = zip(row.split(blocksize), row_back.split(blocksize), strict=True)
            for block, block_back in pairs:
                assert (block - block_back).abs().max() <= 0.51 * gap * block.abs().max()


def test_hard_values(backend: str) -> None:
    tiny, huge = 2.0**-140, 1e19
    blocks = [
        [0.0] * 4, [tiny, 0.0, tiny, 2 * tiny], [huge, 1.0, tiny, 0.0], [1.0, 1e-9, 1e-30, 0.0],
        [float("nan"), 1.0, 0.5, 0.0], [float("inf"), 1.0, 0.0, 0.0], [1.0, -1.0, 1e-20, 0.0],
    ]  # fmt: skip
    gradient = torch.tensor(blocks).flatten()
    expected = encoded_by_the_step(gradient, 4)
    for name, values in (("exp_avg", gradient), ("exp_avg_sq", gradient * gradient)):
        codes, absmax = quantize_moment(name, values, 4)
        assert_same_bits(codes, expected[name][0])
        assert_same_bits(absmax, expected[name][1])
        assert dequantize_moment(name, codes, absmax, 4).isfinite().all()
    assert codes[13] == 1, "a positive second moment must not be zero: it would blow the step up"


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
