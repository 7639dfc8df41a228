"""lora_linear on every backend: y and every gradient against fp64, element by element."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import testing
from feinwerk.codebook import BLOCKSIZES
from feinwerk.testing import assert_same_bits, make_x
from feinwerk.testing.adapters import BASES, Adapter, AdapterCase, make_adapters
from feinwerk.testing.interpreted import some

# (N, K, r): one element, more rank than outputs, odd and prime, whole blocks, a rank beyond tiles.
SHAPES = ((1, 1, 1), (7, 97, 16), (33, 130, 17), (64, 64, 3), (48, 576, 130), (130, 320, 16))
ROWS = (0, 1, 2, 4, 5, 17, 33)
ADAPTER_DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values_and_gradients(backend: str, dtype: torch.dtype, base: str) -> None:
    cases = itertools.product(enumerate(SHAPES), enumerate(ROWS))
    for (i, (N, K, r)), (j, rows) in some(cases, 5):
        make_adapters(
            N, K, rows, (r,), dtype=dtype, base=base,
            adapter_dtype=ADAPTER_DTYPES[(i + j) % 2],
            bias=(None, *testing.DTYPES)[(i + 2 * j) % 4],
            lora_bias=(None, None, torch.float32, torch.bfloat16)[(i + j) % 4],
            dropout_p=(0.0, 0.0, 0.3)[(2 * i + j) % 3],
        ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_more_rows_than_a_chunk(backend: str, dtype: torch.dtype, dropout_p: float) -> None:
    for base in ("nf4", "fp32"):
        make_adapters(9, 70, 1100, (5,), dtype=dtype, base=base, dropout_p=dropout_p).check()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_beyond_depth_blocks(backend: str, dtype: torch.dtype) -> None:
    shapes = ((5, 1100, 3), (700, 40, 3), (20, 90, 600), (9, 530, 257))
    for (N, K, r), rows in some(itertools.product(shapes, (1, 3, 20)), 3):
        make_adapters(N, K, rows, (r,), dtype=dtype, base="nested", dropout_p=0.1).check()


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(backend: str, blocksize: int) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    for K, dtype, rows in some(itertools.product((96, 577), dtypes, (1, 20)), 3):
        make_adapters(21, K, rows, (5,), dtype=dtype, base="nested", blocksize=blocksize).check()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_int8(backend: str, dtype: torch.dtype) -> None:
    for N, K, r in ((7, 97, 16), (64, 64, 3), (48, 576, 17), (9, 1024, 8)):
        for rows in (0, 1, 4, 17):
            make_adapters(
                N, K, rows, (r,), dtype=dtype, base="nested", compute="int8", bias=torch.float32,
                dropout_p=0.0 if rows < 17 else 0.2,
            ).check()  # fmt: skip


@pytest.mark.parametrize("wants", [{"x"}, {"A0"}, {"B0"}, {"bias"}, {"lora_bias"}, {"x", "B0"}])
def test_each_gradient_is_optional(backend: str, wants: set[str]) -> None:
    for base in ("nf4", "fp32"):
        for dropout_p in (0.0, 0.2):
            case = make_adapters(
                11, 96, 5, (3,), base=base, bias=torch.float32, lora_bias=torch.float32,
                dropout_p=dropout_p,
            )  # fmt: skip
            got = case.check(case.run(wants))
            assert got.keys() == {"y", *wants}
            # What is left out does not change a bit of what is not.
            everything = case.run()
            for name in got:
                assert_same_bits(got[name], everything[name], name)


def test_no_gradient_no_graph(backend: str) -> None:
    case = make_adapters(11, 96, 5, (3,), bias=torch.float32)
    y = case.run(wants=())["y"]
    assert not case.call(case.leaves()).requires_grad
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
    with torch.no_grad():
        assert not case.call(leaves).requires_grad
    with torch.inference_mode():
        assert_same_bits(case.call(case.leaves()), y)
    assert_same_bits(case.call(leaves).detach(), y)


def test_scaling_as_a_tensor(backend: str) -> None:
    case = make_adapters(11, 96, 5, (3,), lora_bias=torch.float32)
    one = case.adapters[0]
    for value in (0.7, 2, -1.5, 0.0):
        as_float = dataclasses.replace(case, adapters=(dataclasses.replace(one, scaling=value),))
        want = as_float.check()
        for dtype in (torch.float32, torch.float64):
            scaling = torch.tensor(float(value), dtype=dtype, requires_grad=True)
            adapters = (dataclasses.replace(one, scaling=scaling),)
            got = dataclasses.replace(case, adapters=adapters).run()
            assert scaling.grad is None
            for name in want:
                assert_same_bits(got[name], want[name], name)


def test_a_zero_adapter_is_the_base(backend: str) -> None:
    for dtype in testing.DTYPES:
        for rows in (1, 4, 20):
            case = make_adapters(37, 192, rows, (5,), dtype=dtype, base="nested", bias=dtype)
            zero = Adapter(case.adapters[0].A, torch.zeros(37, 5), 2.0)
            y = dataclasses.replace(case, adapters=(zero,)).run(wants=())["y"]
            weight = case.base
            assert isinstance(weight, testing.WeightCase)
            testing.assert_within_budget(y, case.x, weight.dense(dtype), case.bias)
            assert_same_bits(y, weight.linear(case.x, case.bias))


@pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)])
def test_dimensions_of_x(backend: str, shape: tuple[int, ...]) -> None:
    flat = make_adapters(11, 96, 1, (3,), base="nested")
    for dropout_p in (0.0, 0.25):
        dataclasses.replace(
            flat, x=make_x(shape, torch.float32), grad_y=make_x((*shape[:-1], 11), torch.float32),
            dropout_p=dropout_p, seed=torch.tensor(3),
        ).check()  # fmt: skip


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same values with a stride in each dimension."""
    wide = torch.full([2 * size for size in value.shape], torch.nan, dtype=value.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in value.shape)]
    view.copy_(value)
    return view


def test_strides(backend: str) -> None:
    case = make_adapters(11, 96, 5, (3,), base="fp32", bias=torch.float32, dropout_p=0.2)
    want = case.run()
    one = case.adapters[0]
    variants = [
        dataclasses.replace(case, x=strided(case.x)),
        dataclasses.replace(case, x=case.x.t().contiguous().t()),
        dataclasses.replace(case, grad_y=strided(case.grad_y)),
        dataclasses.replace(case, grad_y=case.grad_y.t().contiguous().t()),
        dataclasses.replace(case, bias=strided(case.bias)),
        dataclasses.replace(case, base=strided(case.base)),
        dataclasses.replace(case, base=case.base.t().contiguous().t()),
        dataclasses.replace(case, adapters=(Adapter(strided(one.A), one.B, one.scaling),)),
        dataclasses.replace(
            case, adapters=(Adapter(one.A, one.B.t().contiguous().t(), one.scaling),)
        ),
    ]
    for variant in variants:
        got = variant.check()
        if backend != "reference":  # torch's own product may round a strided operand otherwise
            for name in want:
                assert_same_bits(got[name], want[name], name)


def test_expanded_x_and_gradient(backend: str) -> None:
    case = make_adapters(11, 96, 5, (3,))
    dataclasses.replace(case, x=case.x[:1].expand(5, 96)).check()
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
    case.call(leaves).sum().backward()  # the gradient arrives with stride 0
    want = dataclasses.replace(case, grad_y=torch.ones(5, 11)).check()
    for name, leaf in leaves.items():
        assert_same_bits(leaf.grad, want[name], name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_for_any_thread_count(backend: str, dropout_p: float) -> None:
    if backend == "reference":
        return  # its matmul is torch's
    for dtype in testing.DTYPES:
        for rows in (1, 5, 70):
            for base in ("nested", "bf16"):
                case = make_adapters(
                    200, 256, rows, (17,), dtype=dtype, base=base, bias=dtype, dropout_p=dropout_p
                )
                want = case.run()
                for threads in (2, 3):
                    torch.set_num_threads(threads)
                    for name, value in case.run().items():
                        assert_same_bits(value, want[name], f"{name}, {threads} threads")
                torch.set_num_threads(1)


def test_rows_do_not_depend_on_poisoned_neighbours(backend: str) -> None:
    for rows in (1, 2, 17):
        case = make_adapters(9, 65, rows + 1, (3,))
        x = case.x.clone()
        x[-1] = torch.nan
        y = dataclasses.replace(case, x=x).run(wants=())["y"]
        assert y[:-1].isfinite().all()
        assert y[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    case = make_adapters(6, 96, 5, (3,), base="nested", bias=torch.float32, dropout_p=0.2)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
    with torch.autocast("cpu", dtype=dtype):
        y = case.call(leaves)
    assert y.dtype is dtype
    grad_y = case.grad_y.to(dtype)
    y.backward(grad_y)
    got = {name: leaf.grad for name, leaf in leaves.items()}
    low = dataclasses.replace(case, x=case.x.to(dtype), grad_y=grad_y)
    assert got["x"].dtype is torch.float32
    got["x"] = got["x"].to(dtype)  # it was rounded to dtype on its way
    low.check({"y": y.detach(), **got})


@given(
    N=st.integers(1, 80),
    K=st.integers(1, 200),
    r=st.integers(1, 90),
    rows=st.integers(0, 24),
    dtype=st.sampled_from(testing.DTYPES),
    adapter_dtype=st.sampled_from(testing.DTYPES),
    base=st.sampled_from(BASES),
    blocksize=st.sampled_from(BLOCKSIZES),
    dropout_p=st.sampled_from([0.0, 0.05, 0.7]),
    lora_bias=st.sampled_from([None, torch.float32]),
)
def test_any_sizes(
    backend: str, N: int, K: int, r: int, rows: int, dtype: torch.dtype,
    adapter_dtype: torch.dtype, base: str, blocksize: int, dropout_p: float,
    lora_bias: torch.dtype | None,
) -> None:  # fmt: skip
    make_adapters(
        N, K, rows, (r,), dtype=dtype, adapter_dtype=adapter_dtype, base=base, blocksize=blocksize,
        dropout_p=dropout_p, lora_bias=lora_bias, seed=N + K,
    ).check()  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_full_matrix(backend: str, dtype: torch.dtype, base: str) -> None:
    shapes = ((1, 4097, 2), (127, 129, 64), (257, 1024, 16), (577, 512, 31), (2048, 96, 8))
    numbers = (1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 130)
    for (N, K, r), rows, dropout_p in some(itertools.product(shapes, numbers, (0.0, 0.05)), 6):
        make_adapters(
            N, K, rows, (r,), dtype=dtype, adapter_dtype=torch.bfloat16, base=base,
            bias=dtype, dropout_p=dropout_p,
        ).check()  # fmt: skip


def test_nf4_and_its_dense_copy_agree(backend: str) -> None:
    nf4 = make_adapters(33, 130, 17, (5,), base="nested", dropout_p=0.1)
    dense: AdapterCase = dataclasses.replace(nf4, base=nf4.dense())
    nf4.check()
    dense.check()
