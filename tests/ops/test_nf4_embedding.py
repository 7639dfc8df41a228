"""nf4_embedding on every backend: the rows that nf4_dequantize gives, and bad indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import nf4_embedding, testing
from feinwerk.codebook import BLOCKSIZES
from feinwerk.testing import assert_same_bits, make_weight

OP = torch.ops.feinwerk.nf4_embedding.default


def embed(
    weight: testing.WeightCase, indices: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return nf4_embedding(
        indices, weight.packed, weight.absmax, *weight.nested, **weight.sizes, dtype=dtype
    )


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_rows_are_the_dense_rows(backend: str, dtype: torch.dtype, double_quant: bool) -> None:
    for N, K in testing.SHAPES:
        for blocksize in (32, 64, 4096):
            weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
            indices = torch.randint(N, (23,), generator=torch.Generator().manual_seed(K))
            indices[:2] = torch.tensor([0, N - 1])
            got = embed(weight, indices, dtype)
            assert_same_bits(got, weight.dense(dtype)[indices], f"{N}x{K}")


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_any_shape_of_indices(
    backend: str, shape: tuple[int, ...], index_dtype: torch.dtype
) -> None:
    weight = make_weight(10, 33)
    indices = torch.randint(10, shape, generator=torch.Generator().manual_seed(0)).to(index_dtype)
    got = embed(weight, indices)
    assert got.shape == (*shape, 33)
    assert_same_bits(got, weight.dense()[indices.long()])


def test_non_contiguous_indices(backend: str) -> None:
    weight = make_weight(10, 33)
    indices = torch.arange(10).view(2, 5).t()
    assert_same_bits(embed(weight, indices), weight.dense()[indices])
    assert_same_bits(embed(weight, torch.arange(10)[::3]), weight.dense()[::3])


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
def test_index_out_of_range(backend: str, bad: int) -> None:
    weight = make_weight(10, 33)
    for index_dtype in (torch.int64, torch.int32):
        for where in (0, 7):
            indices = torch.zeros(8, dtype=index_dtype)
            indices[where] = bad
            with pytest.raises(IndexError, match=r"nf4_embedding: indices must be in \[0, 10\)"):
                embed(weight, indices)
    with pytest.raises(IndexError, match="nf4_embedding: indices"):
        embed(weight, torch.tensor([2**62]))


@given(
    N=st.integers(1, 50),
    K=st.integers(1, 300),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(testing.DTYPES),
    double_quant=st.booleans(),
)
def test_any_sizes(
    backend: str, N: int, K: int, blocksize: int, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant, seed=N * K)
    indices = torch.arange(N).flip(0)
    assert_same_bits(embed(weight, indices, dtype), weight.dense(dtype).flip(0))


def test_opcheck(backend: str) -> None:
    for double_quant in (False, True):
        weight = make_weight(6, 33, double_quant=double_quant)
        args = (torch.tensor([[1, 5]]), weight.packed, weight.absmax, *weight.nested)
        torch.library.opcheck(OP, args, {**weight.sizes, "dtype": torch.bfloat16})


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 33, double_quant=True)
    compiled = torch.compile(lambda i: embed(weight, i).relu(), fullgraph=True, backend="aot_eager")
    indices = torch.tensor([1, 5, 0])
    assert_same_bits(compiled(indices), embed(weight, indices).relu())


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    N, K = 2**18, 2**14 + 2
    packed = torch.empty(N * K // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-N * K // 64), device="meta")
    indices = torch.empty(3, 2, dtype=torch.int64, device="meta")
    out = nf4_embedding(indices, packed, absmax, N=N, K=K, dtype=torch.bfloat16)
    assert out.shape == (3, 2, K)
