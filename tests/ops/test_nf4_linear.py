"""nf4_linear forward on every backend: values, shapes, threads, compile, autocast, int8."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import nf4_linear, testing
from feinwerk.codebook import BLOCKSIZES
from feinwerk.testing import (
    assert_same_bits,
    assert_within,
    assert_within_budget,
    linear_budget,
    make_weight,
    make_x,
)
from feinwerk.testing.interpreted import some

OP = torch.ops.feinwerk.nf4_linear.default


@functools.lru_cache(maxsize=512)  # the backends follow each other
def given_and_wanted(
    weight: testing.WeightCase,
    rows: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    compute: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    x = make_x((rows, weight.K), dtype, seed=rows)
    bias = None if bias_dtype is None else make_x((weight.N,), bias_dtype, seed=7)
    scales = weight.scales() if compute == "int8" else None
    return x, bias, *linear_budget(x, weight.dense(dtype), bias, scales=scales)


def check(
    weight: testing.WeightCase,
    rows: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> None:
    x, bias, truth, budget = given_and_wanted(weight, rows, dtype, bias_dtype, compute)
    assert_within(weight.linear(x, bias, compute=compute), truth, budget, dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values(backend: str, dtype: torch.dtype, double_quant: bool) -> None:
    for (N, K), rows in some(itertools.product(testing.SHAPES, testing.ROWS), 12):
        check(make_weight(N, K, double_quant=double_quant), rows, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(backend: str, blocksize: int) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    for K, rows, dtype in some(itertools.product((96, 577, 4096 + 64), (1, 20), dtypes), 4):
        check(make_weight(5, K, blocksize=blocksize, double_quant=True), rows, dtype)


def test_many_nested_blocks(backend: str) -> None:
    # More than 256 absmax codes, so that several nested_absmax are in use, one of them partial.
    weight = make_weight(70, 1000, blocksize=32, double_quant=True)
    assert weight.nested[0] is not None
    assert weight.nested[0].numel() > 2
    for rows in (1, 40):
        check(weight, rows, torch.float32)


@pytest.mark.parametrize("bias_dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_bias(backend: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    for rows in (1, 4, 40):
        check(make_weight(37, 129), rows, dtype, bias_dtype)


@pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)])
def test_dimensions_of_x(backend: str, shape: tuple[int, ...]) -> None:
    weight = make_weight(11, 96)
    x = make_x(shape, torch.float32)
    y = weight.linear(x)
    assert y.shape == (*shape[:-1], 11)
    assert_within_budget(y.reshape(-1, 11), x.reshape(-1, 96), weight.dense())


def test_non_contiguous_x(backend: str) -> None:
    weight = make_weight(11, 96)
    transposed = make_x((96, 5), torch.float32).t()
    strided = make_x((5, 192), torch.float32)[:, ::2]
    offset = make_x((5, 97), torch.float32)[:, 1:]
    expanded = make_x((1, 96), torch.float32).expand(5, 96)
    backwards = make_x((5, 3, 96), torch.float32).transpose(0, 1)
    for x in (transposed, strided, offset, expanded, backwards):
        y = weight.linear(x)
        assert_within_budget(y.reshape(-1, 11), x.reshape(-1, 96), weight.dense())
        if backend != "reference":  # torch's own product may round a strided x otherwise
            assert_same_bits(y, weight.linear(x.contiguous()))


def test_packed_of_any_shape(backend: str) -> None:
    weight = make_weight(6, 64)
    x = make_x((3, 64), torch.float32)
    column = nf4_linear(x, weight.packed.view(-1, 1), weight.absmax, **weight.sizes)
    assert_same_bits(column, weight.linear(x))


def test_same_bits_for_any_thread_count_and_grad_mode(backend: str) -> None:
    for dtype in testing.DTYPES:
        for rows in (1, 5, 64):
            weight = make_weight(200, 256, double_quant=True)
            x = make_x((rows, 256), dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(weight.linear(x))
            results.append(weight.linear(x.clone().requires_grad_()).detach())
            if backend != "reference":  # the reference's matmul is torch's
                for result in results[1:]:
                    assert_same_bits(result, results[0])


def test_rows_do_not_depend_on_poisoned_neighbours(backend: str) -> None:
    weight = make_weight(9, 65)
    for rows in (1, 2, 17):
        x = make_x((rows + 1, 65), torch.float32)
        x[-1] = torch.nan
        y = weight.linear(x)
        assert y[:-1].isfinite().all()
        assert y[-1].isnan().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_int8(backend: str, dtype: torch.dtype) -> None:
    for N, K in (*testing.SHAPES, (9, 1024)):
        weight = make_weight(N, K, double_quant=True)
        for rows in (0, 1, 4, 17):
            check(weight, rows, dtype, torch.float32, compute="int8")
    weight = make_weight(64, 1024)
    x = make_x((4, 1024), dtype)
    truth = x.double() @ weight.dense(dtype).double().t()
    error = (weight.linear(x, compute="int8").double() - truth).norm() / truth.norm()
    assert error < 0.012  # the activations' 8 bits: about 0.7 % of a normal random x


def test_int8_zero_and_large_blocks(backend: str) -> None:
    weight = make_weight(8, 192)
    x = make_x((2, 192), torch.float32)
    x[:, :64] = 0
    x[:, 64:128] *= 1e4
    y = weight.linear(x, compute="int8")
    assert_within_budget(y, x, weight.dense(), scales=weight.scales())


@given(
    N=st.integers(1, 80),
    K=st.integers(1, 300),
    rows=st.integers(0, 24),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(testing.DTYPES),
    double_quant=st.booleans(),
    compute=st.sampled_from(["exact", "int8"]),
)
def test_any_sizes(
    backend: str,
    N: int,
    K: int,
    rows: int,
    blocksize: int,
    dtype: torch.dtype,
    double_quant: bool,
    compute: str,
) -> None:
    weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant, seed=N + K)
    check(weight, rows, dtype, None if N % 2 else dtype, compute)


@pytest.mark.full
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_full_matrix(backend: str, dtype: torch.dtype, blocksize: int) -> None:
    shapes = ((1, 4097), (127, 129), (257, 1024), (512, 577), (96, 2048))
    numbers = (1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 31, 32, 63, 65, 130)
    for (N, K), double_quant, rows in some(itertools.product(shapes, (False, True), numbers), 8):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        check(weight, rows, dtype, dtype)
        if rows < 20:
            check(weight, rows, dtype, compute="int8")


def test_opcheck(backend: str) -> None:
    for double_quant in (False, True):
        weight = make_weight(6, 96, double_quant=double_quant)
        bias = make_x((6,), torch.float32)
        x = make_x((2, 3, 96), torch.bfloat16)
        args = (x, weight.packed, weight.absmax, bias, *weight.nested)
        torch.library.opcheck(OP, args, weight.sizes)
        torch.library.opcheck(OP, args, {**weight.sizes, "compute": "int8"})


def test_compile_fullgraph_with_dynamic_rows(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 96, double_quant=True)
    compiled = torch.compile(
        lambda x, b: torch.relu(weight.linear(x * 2, b)),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    bias = make_x((6,), torch.float32)
    for rows in (2, 3, 5):
        x = make_x((rows, 96), torch.float32)
        assert_same_bits(compiled(x, bias), torch.relu(weight.linear(x * 2, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    weight = make_weight(6, 96)
    x = make_x((3, 96), torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = weight.linear(x)
    assert_within_budget(y.detach(), x.detach().to(dtype), weight.dense(dtype))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_autocast_does_not_hide_a_wrong_dtype(dtype: torch.dtype) -> None:
    weight = make_weight(6, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="x must be"):
        weight.linear(torch.ones(2, 96).to(dtype))


def test_compile_under_autocast(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 96)
    x = make_x((3, 96), torch.float32)
    compiled = torch.compile(weight.linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(compiled(x), weight.linear(x))


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    N, K = 2**17 + 1, 2**14 + 2
    packed = torch.empty(N * K // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-N * K // 64), device="meta")
    x = torch.empty(2, K, device="meta")
    assert nf4_linear(x, packed, absmax, N=N, K=K).shape == (2, N)
    with pytest.raises(ValueError, match=f"absmax must have {-(-N * K // 64)} elements"):
        nf4_linear(x, packed, absmax[:-1], N=N, K=K)
