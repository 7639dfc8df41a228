"""What the interpreter's own choices leave out of nf4_linear in Triton: slabs, and other cuts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from feinwerk import _library, testing
from feinwerk.testing import assert_same_bits, assert_within_budget, make_weight, make_x

if not _library.interpreting():  # not collected there, unless somebody names this file
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

from feinwerk.ops.nf4_linear import triton as linear
from feinwerk.ops.nf4_linear import triton_vector
from feinwerk.triton_lib import Gpu
from feinwerk.triton_tuning import (
    ANY_ROWS,
    DecodeChoice,
    LinearTuning,
    SlabChoice,
    TileChoice,
    VectorChoice,
)

SLABS = LinearTuning(
    decode_rows=0,
    tile_rows=0,
    tile_rows_transposed=0,
    tile_rows_fp32=0,
    slabs=(SlabChoice(ANY_ROWS, 1 << 17, 1 << 17),),
)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_both_directions(dtype: torch.dtype, double_quant: bool) -> None:
    for N, K, blocksize in ((600, 130, 64), (37, 577, 32), (300, 768, 128)):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        x, grad = make_x((5, K), dtype), make_x((5, N), dtype, seed=1)
        bias = make_x((N,), torch.float32, seed=2)
        dense = weight.dense(dtype)
        y = linear.multiply(x, weight.tables, bias, tuning=SLABS, **weight.sizes)
        assert_within_budget(y, x, dense, bias)
        y = linear.multiply(x, weight.tables, tuning=SLABS, **weight.sizes)
        assert_within_budget(y, x, dense)
        grad_x = linear.multiply_transposed(grad, weight.tables, tuning=SLABS, **weight.sizes)
        assert_within_budget(grad_x, grad, dense.t())


def test_slabs_cover_the_weight_once_and_are_bounded() -> None:
    weight = make_weight(1100, 192)
    dense = weight.dense(torch.bfloat16)
    for by, count, other in (("rows", 1100, 192), ("columns", 192, 1100)):
        size = 256 * other * 2
        tuning = dataclasses.replace(SLABS, slabs=(SlabChoice(ANY_ROWS, size, size),))
        end = 0
        found = []
        for begin, after, slab in linear.slabs(
            weight.tables, 1100, 192, 64, torch.bfloat16, by, tuning=tuning
        ):
            assert begin == end
            assert slab.numel() * 2 <= size
            end = after
            found.append(slab.clone())
        assert end == count
        assert_same_bits(torch.cat(found, dim=0 if by == "rows" else 1), dense)


def test_out_may_be_a_slice() -> None:
    weight = make_weight(130, 128)
    for dtype in (torch.float32, torch.bfloat16):
        for tuning in (None, SLABS):
            x = make_x((3, 128), dtype)
            around = torch.zeros((3, 140), dtype=dtype)
            out = around[:, 4:134]
            y = linear.multiply(x, weight.tables, out=out, tuning=tuning, **weight.sizes)
            assert y is out
            assert_within_budget(out, x, weight.dense(dtype))
            assert not around[:, :4].any()
            assert not around[:, 134:].any()


@pytest.mark.parametrize("runs", [1, 4, 8])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_for_any_cut_of_K(splits: int, runs: int) -> None:
    choice = DecodeChoice(tile=64, runs=runs, splits=splits, least_steps=1)
    tuning = LinearTuning(
        vector=VectorChoice(words=0), decode=choice, decode_many=choice, decode_outputs=1
    )
    for K in (320, 768):
        weight = make_weight(150, K, double_quant=True)
        bias = make_x((150,), torch.float32, seed=2)
        for rows in (1, 2, 3, 9):
            x = make_x((rows, K), torch.bfloat16)
            y = linear.multiply(x, weight.tables, bias, tuning=tuning, **weight.sizes)
            assert_within_budget(y, x, weight.dense(torch.bfloat16), bias)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_for_any_cut(dtype: torch.dtype, double_quant: bool) -> None:
    # Rows of whole parts or not, of one or several blocks of absmax codes, tiles that fit or not.
    for N, K, blocksize, words in ((37, 64, 32, 4), (130, 576, 64, 16), (9, 32768, 32, 16)):
        tuning = LinearTuning(vector=VectorChoice(words=words, longest=2 * K, outputs=1))
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        bias = make_x((N,), torch.float32, seed=2)
        for rows in (1, 2):
            x = make_x((rows, K), dtype)
            y = linear.multiply(x, weight.tables, bias, tuning=tuning, **weight.sizes)
            assert_within_budget(y, x, weight.dense(dtype), bias)


def test_rows_that_vectors_leave_to_others() -> None:
    weight = make_weight(130, 192, blocksize=128)
    packed, choice = weight.tables[0], VectorChoice(outputs=130)
    assert packed is not None
    x = make_x((1, 192), torch.bfloat16)
    assert triton_vector.suits(x, packed, 130, 64, choice)
    assert not triton_vector.suits(x, packed, 129, 64, choice)
    assert not triton_vector.suits(x, packed, 130, 128, choice)  # a block in two rows
    assert not triton_vector.suits(make_x((3, 192), torch.bfloat16), packed, 130, 64, choice)
    assert not triton_vector.suits(x, packed[1:], 130, 64, choice)  # words begin inside of words
    assert not triton_vector.suits(x, packed, 130, 64, VectorChoice(words=0, outputs=1))
    assert not triton_vector.suits(x, packed, 130, 64, VectorChoice(longest=128, outputs=1))
    for tables in (weight.tables, (torch.cat([packed[:1], packed])[1:], *weight.tables[1:])):
        y = linear.multiply(x, tables, tuning=LinearTuning(vector=choice), **weight.sizes)
        assert_within_budget(y, x, weight.dense(torch.bfloat16))


def test_slabs_fill_waves_of_tiles() -> None:
    gpu = Gpu("cuda", "90", 132, 232448)
    choice = SlabChoice(ANY_ROWS, 32 << 20, 28 << 20)
    # A weight of 32 MiB is one slab; of others 3584 rows at most.
    assert linear.slab_step(4096, 8192, 2048, choice, gpu) == 4096
    # 16 by 8 tiles are a wave of 132, 16 by 14 nearly two; 64 by 14 are nearly seven.
    assert linear.slab_step(14336, 8192, 2048, choice, gpu) == 2048
    assert linear.slab_step(14336, 8192, 8192, choice, gpu) == 3584
    assert linear.slab_step(14336, 8192, None, choice, gpu) == 3584
    # A row may be longer than a slab should be: then a slab is one tile wide.
    assert linear.slab_step(14336, 1 << 20, 2048, choice, gpu) == 256
    assert linear.slab_step(100, 1 << 20, 2048, choice, gpu) == 100


@pytest.mark.parametrize("splits", [1, 3])
def test_tiles_for_any_cut(splits: int) -> None:
    tile = TileChoice(block_m=16, block_n=32, splits=splits, lookup="table")
    tuning = dataclasses.replace(
        LinearTuning(), decode_rows=0, tile=tile, transposed=tile, tile_rows_transposed=64,
        general=dataclasses.replace(tile, block_k=32),
    )  # fmt: skip
    for K, blocksize in ((256, 64), (200, 32), (97, 64)):
        weight = make_weight(70, K, blocksize=blocksize, double_quant=True)
        x, grad = make_x((20, K), torch.bfloat16), make_x((20, 70), torch.bfloat16, seed=1)
        dense = weight.dense(torch.bfloat16)
        y = linear.multiply(x, weight.tables, tuning=tuning, **weight.sizes)
        assert_within_budget(y, x, dense)
        grad_x = linear.multiply_transposed(grad, weight.tables, tuning=tuning, **weight.sizes)
        assert_within_budget(grad_x, grad, dense.t())
