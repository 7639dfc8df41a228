"""nf4_dequantize on every backend: exact values, bit equality, bitsandbytes' result."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import nf4_dequantize, testing
from feinwerk.codebook import BLOCKSIZES, NF4_VALUES
from feinwerk.testing import assert_same_bits, make_weight
from feinwerk.testing.interpreted import some

OP = torch.ops.feinwerk.nf4_dequantize.default


def dequantize(weight: testing.WeightCase, dtype: torch.dtype) -> torch.Tensor:
    return nf4_dequantize(
        weight.packed,
        weight.absmax,
        *weight.nested,
        shape=(weight.N, weight.K),
        blocksize=weight.blocksize,
        dtype=dtype,
    )


def element_by_element(weight: testing.WeightCase) -> torch.Tensor:
    """The format page in plain Python numbers: one fp32 rounding a product, one a sum."""

    def fp32(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).item()

    absmax = weight.absmax.tolist()
    if weight.nested[0] is not None:
        scales, codebook, offset = (t.tolist() for t in weight.nested)
        absmax = [fp32(fp32(codebook[q] * scales[i // 256]) + offset) for i, q in enumerate(absmax)]
    values = []
    for e in range(weight.N * weight.K):
        byte = int(weight.packed[e // 2])
        code = byte & 15 if e % 2 else byte >> 4
        values.append(fp32(fp32(NF4_VALUES[code]) * absmax[e // weight.blocksize]))
    return torch.tensor(values).view(weight.N, weight.K)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_values_by_the_format_page(backend: str, double_quant: bool) -> None:
    for N, K, blocksize in ((1, 1, 32), (3, 17, 32), (7, 96, 64), (37, 250, 32)):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        expected = element_by_element(weight)
        for dtype in testing.DTYPES:
            assert_same_bits(dequantize(weight, dtype), expected.to(dtype))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_same_bits_on_every_backend(backend: str, double_quant: bool, blocksize: int) -> None:
    shapes = (*testing.SHAPES, (3, 4097), (513, 64))
    for (N, K), dtype in some(itertools.product(shapes, testing.DTYPES), 16):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        assert_same_bits(dequantize(weight, dtype), weight.dense(dtype), f"{N}x{K}")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_code_with_extreme_scales(backend: str, dtype: torch.dtype) -> None:
    # Ties, denormals, overflow to infinity, the sign of zero: all as one fp32 product, rounded.
    scales = torch.tensor(
        [0.0, -0.0, 1e-45, 3e-42, 6e-8, 1.0, 65504.0, 65520.0, 1e38, 3.4e38, torch.inf, torch.nan]
        + [1.0 + i * 2.0**-9 for i in range(52)]
    )
    codes = torch.arange(16, dtype=torch.uint8).repeat(64 * 2)
    packed = codes[::2] << 4 | codes[1::2]
    got = nf4_dequantize(packed, scales, shape=(64, 32), blocksize=32, dtype=dtype)
    values = torch.tensor(NF4_VALUES).repeat(64 * 2).view(64, 32)
    assert_same_bits(got, (values * scales.unsqueeze(1)).to(dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equal_to_bitsandbytes(backend: str, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for shape in ((64, 128), (33, 64)):  # K where bitsandbytes' own kernel is right, and quick
        dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        got = nf4_dequantize(
            packed,
            state.absmax,
            state.state2.absmax,
            state.state2.code,
            state.offset,
            shape=shape,
            dtype=dtype,
        )
        assert_same_bits(got, dequantize_4bit(packed, state))


@given(
    N=st.integers(1, 60),
    K=st.integers(1, 400),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(testing.DTYPES),
    double_quant=st.booleans(),
)
def test_any_sizes(
    backend: str, N: int, K: int, blocksize: int, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant, seed=N * K)
    assert_same_bits(dequantize(weight, dtype), weight.dense(dtype))


def test_shapes_of_any_rank(backend: str) -> None:
    weight = make_weight(6, 70)
    expected = weight.dense().view(-1)
    for shape in ((420,), (6, 70), (2, 3, 70), (2, 3, 7, 10)):
        got = nf4_dequantize(weight.packed, weight.absmax, shape=shape)
        assert_same_bits(got, expected.view(shape))
    column = nf4_dequantize(weight.packed.view(-1, 1), weight.absmax, shape=torch.Size((6, 70)))
    assert_same_bits(column, weight.dense())


def test_same_bits_for_any_thread_count(backend: str) -> None:
    weight = make_weight(300, 200, double_quant=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(dequantize(weight, torch.bfloat16), weight.dense(torch.bfloat16))


def test_opcheck(backend: str) -> None:
    for double_quant in (False, True):
        weight = make_weight(6, 33, double_quant=double_quant)
        args = (weight.packed, weight.absmax, *weight.nested)
        torch.library.opcheck(OP, args, {"shape": [6, 33], "dtype": torch.bfloat16})


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 64, double_quant=True)
    compiled = torch.compile(
        lambda: dequantize(weight, torch.bfloat16) * 2, fullgraph=True, backend="aot_eager"
    )
    assert_same_bits(compiled(), dequantize(weight, torch.bfloat16) * 2)


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    count = 2**31 + 3
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-count // 4096), device="meta")
    out = nf4_dequantize(packed, absmax, shape=(count,), blocksize=4096, dtype=torch.bfloat16)
    assert out.shape == (count,)
    with pytest.raises(ValueError, match="packed must have"):
        nf4_dequantize(packed, absmax, shape=(count + 2,), blocksize=4096)
