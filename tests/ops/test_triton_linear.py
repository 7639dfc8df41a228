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
from feinwerk.triton_tuning import DecodeChoice, LinearTuning, TileChoice

SLABS = LinearTuning(
    decode_rows=0,
    tile_rows=0,
    tile_rows_transposed=0,
    tile_rows_fp32=0,
    slab_bytes=1 << 17,
    slab_bytes_many=1 << 17,
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
        tuning = dataclasses.replace(SLABS, slab_bytes=256 * other * 2)
        end = 0
        found = []
        for begin, after, slab in linear.slabs(
            weight.tables, 1100, 192, 64, torch.bfloat16, by, tuning=tuning
        ):
            assert begin == end
            assert slab.numel() * 2 <= tuning.slab_bytes
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
    tuning = LinearTuning(decode=choice, decode_many=choice, decode_outputs=1)
    for K in (320, 768):
        weight = make_weight(150, K, double_quant=True)
        bias = make_x((150,), torch.float32, seed=2)
        for rows in (1, 2, 3, 9):
            x = make_x((rows, K), torch.bfloat16)
            y = linear.multiply(x, weight.tables, bias, tuning=tuning, **weight.sizes)
            assert_within_budget(y, x, weight.dense(torch.bfloat16), bias)


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
