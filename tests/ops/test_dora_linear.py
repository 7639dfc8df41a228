"""dora_linear on every backend: y and every gradient against fp64, and the rules at the edges."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import testing
from feinwerk.codebook import BLOCKSIZES
from feinwerk.testing import assert_same_bits, assert_within, make_x
from feinwerk.testing.adapters import BASES, AdapterCase, make_adapters
from feinwerk.testing.interpreted import some

OP = torch.ops.feinwerk.lora_linear.default

SHAPES = ((1, 1, 1), (7, 97, 16), (33, 130, 17), (64, 64, 3), (48, 576, 130), (130, 320, 16))
ROWS = (0, 1, 2, 4, 5, 17, 33)
ADAPTER_DTYPES = (torch.float32, torch.bfloat16)


def dora(N: int, K: int, rows: int, r: int, **options: Any) -> AdapterCase:
    return make_adapters(N, K, rows, (r,), dora=(True,), **options)


def changed(case: AdapterCase, **values: Any) -> AdapterCase:
    """The case with another A, B, scaling or magnitude."""
    return dataclasses.replace(case, adapters=(dataclasses.replace(case.adapters[0], **values),))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values_and_gradients(backend: str, dtype: torch.dtype, base: str) -> None:
    cases = itertools.product(enumerate(SHAPES), enumerate(ROWS))
    for (i, (N, K, r)), (j, rows) in some(cases, 5):
        dora(
            N, K, rows, r, dtype=dtype, base=base,
            adapter_dtype=ADAPTER_DTYPES[(i + j) % 2],
            bias=(None, *testing.DTYPES)[(i + 2 * j) % 4],
            dropout_p=(0.0, 0.0, 0.3)[(2 * i + j) % 3],
        ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_many_rows_and_depth_blocks(backend: str, dtype: torch.dtype, dropout_p: float) -> None:
    shapes = ((9, 70, 1100, 5), (5, 1100, 3, 3), (700, 40, 20, 3), (20, 90, 5, 600))
    for (N, K, rows, r), base in some(itertools.product(shapes, ("nested", "fp32")), 3):
        dora(N, K, rows, r, dtype=dtype, base=base, dropout_p=dropout_p).check()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_int8(backend: str, dtype: torch.dtype) -> None:
    shapes = ((7, 97, 16), (48, 576, 17), (9, 1024, 8))
    for (N, K, r), rows in some(itertools.product(shapes, (0, 1, 4, 17)), 4):
        dora(N, K, rows, r, dtype=dtype, base="nested", compute="int8").check()


def at_initialisation(case: AdapterCase) -> AdapterCase:
    B = torch.zeros_like(case.adapters[0].B)
    return changed(case, B=B, magnitude=case.base_norm())


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_an_exact_no_op_at_initialisation(
    backend: str, dtype: torch.dtype, base: str, dropout_p: float
) -> None:
    for rows in (1, 4, 5, 33):
        for N, K in ((33, 130), (64, 192)):
            case = dora(N, K, rows, 5, dtype=dtype, base=base, bias=dtype, dropout_p=dropout_p)
            case = at_initialisation(case)
            got, lora = case.run(), changed(case, magnitude=None).run()
            for name in ("A0", "B0", "bias"):
                assert_same_bits(got[name], lora[name], name)
            if dropout_p == 0:
                assert_same_bits(got["x"], lora["x"], "x")
            elif rows <= 4:
                continue  # two products of one decode: not the kernel that few rows have else
            assert_same_bits(got["y"], lora["y"], "y")
            if isinstance(case.base, testing.WeightCase):
                assert_same_bits(got["y"], case.base.linear(case.x, case.bias))


@pytest.mark.parametrize("wants", [{"x"}, {"A0"}, {"B0"}, {"magnitude0"}, {"bias"}, {"x", "A0"}])
def test_each_gradient_is_optional(backend: str, wants: set[str]) -> None:
    for dropout_p in (0.0, 0.2):
        case = dora(11, 96, 5, 3, bias=torch.float32, dropout_p=dropout_p)
        got, everything = case.check(case.run(wants)), case.run()
        assert got.keys() == {"y", *wants}
        for name in got:
            assert_same_bits(got[name], everything[name], name)


def behind_autograd(y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


IN_PLACE = {
    "relu_": (torch.relu_, lambda y: (y > 0).to(y.dtype)),
    "mul_": (lambda y: y.mul_(2), lambda y: torch.full_like(y, 2)),
    "add_": (lambda y: y.add_(100), torch.ones_like),
    "no_grad": (behind_autograd, torch.ones_like),
    "slice": (lambda y: y[1:].zero_().sum() + y.sum(), None),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_an_output_changed_in_place(
    backend: str, dtype: torch.dtype, name: str, dropout_p: float
) -> None:
    case = dora(33, 130, 9, 5, dtype=dtype, bias=torch.float32, dropout_p=dropout_p)
    change, derivative = IN_PLACE[name]
    leaves = {key: leaf.requires_grad_() for key, leaf in case.leaves().items()}
    y = case.call(leaves)
    before = y.detach().clone()
    if derivative is None:
        change(y).backward()
        grad_y = torch.zeros_like(before)
        grad_y[:1] = 1
    else:
        change(y).backward(case.grad_y)
        grad_y = case.grad_y * derivative(before)
    got = {key: leaf.grad for key, leaf in leaves.items()}
    dataclasses.replace(case, grad_y=grad_y).check({"y": before, **got})


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("times", [1.0, 30.0, 1100.0])
def test_a_bias_that_swallows_the_output(backend: str, dtype: torch.dtype, times: float) -> None:
    for rows in (1, 4, 33):
        case = dora(33, 130, rows, 5, dtype=dtype, bias=torch.float32)
        assert case.bias is not None
        plain = dataclasses.replace(case, bias=None)
        size = plain.bounds()["y"][0].abs().max()
        large = dataclasses.replace(case, bias=case.bias.sign() * (times * size).float())
        got = large.check()
        if times == 1100.0 or (times > 1 and dtype is not torch.float32):
            # The saved output says nothing (in fp32 above 1,024): the gradient is as near as
            # without a bias.
            plain.check({"magnitude0": got["magnitude0"]})


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gains_that_leave_nothing_of_the_output(
    backend: str, dtype: torch.dtype, dropout_p: float
) -> None:
    # In fp16 an output this small is a subnormal or zero, and says nothing.
    case = dora(33, 130, 9, 5, dtype=dtype, dropout_p=dropout_p)
    magnitude = case.adapters[0].magnitude
    for size in (1e-2, 1e-4, 1e-7):
        got = changed(case, magnitude=magnitude * size).check()
        if size < 1e-3:  # recomputed: the gradient does not depend on the magnitude
            exact = case.bounds()["magnitude0"][0]
            strict = changed(case, magnitude=magnitude * 1e-7).bounds()["magnitude0"][1]
            assert_within(got["magnitude0"], exact, strict, torch.float32)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_magnitudes_of_zero_below_zero_and_tiny(
    backend: str, dtype: torch.dtype, dropout_p: float
) -> None:
    case = dora(33, 130, 9, 5, dtype=dtype, bias=dtype, dropout_p=dropout_p)
    magnitude = case.adapters[0].magnitude.clone()
    magnitude[::3] = 0
    magnitude[1::3] *= -1
    magnitude[5] = 1e-30
    got = changed(case, magnitude=magnitude).check()
    if dropout_p == 0:
        assert_same_bits(got["y"][:, ::3], case.bias[::3].expand(9, -1).contiguous())
    assert got["magnitude0"][::3].abs().min() > 0
    changed(case, magnitude=torch.zeros(33)).check()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_zero_rows_of_the_weight(
    backend: str, dtype: torch.dtype, base: str, dropout_p: float
) -> None:
    case = dora(33, 128, 9, 5, dtype=dtype, base=base, bias=dtype, dropout_p=dropout_p)
    if isinstance(case.base, testing.WeightCase):
        if base == "nested":
            return  # its codes of absmax hold no exact zero
        absmax = case.base.absmax.clone()
        absmax.view(33, 2)[[3, 4, 20]] = 0
        weight: Any = dataclasses.replace(case.base, absmax=absmax)
    else:
        weight = case.base.clone()
        weight[[3, 4, 20]] = 0
    B = case.adapters[0].B.clone()
    B[[4, 20]] = 0  # a row without any direction; row 3 has the adapter's
    case = changed(dataclasses.replace(case, base=weight), B=B)
    got = case.check()
    for value in got.values():
        assert value.isfinite().all()
    for row in (4, 20):
        assert not got["magnitude0"][row].any()
        if dropout_p == 0:
            assert_same_bits(got["y"][:, row], case.bias[row].expand(9).contiguous())


def norms_used(case: AdapterCase) -> torch.Tensor:
    one = case.adapters[0]
    scaling = torch.tensor([one.s])
    return OP(
        case.x, *case.tables, case.bias, [one.A], [one.B], scaling, None, [one.magnitude],
        case.base_norm(), None, None, blocksize=case.blocksize,
    )[2]  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_known_norm_equals_the_fresh_one(backend: str, dtype: torch.dtype) -> None:
    for base, rows in some(itertools.product(BASES, (1, 5, 33)), 3):
        case = dora(33, 130, rows, 5, dtype=dtype, base=base, bias=dtype)
        norms = norms_used(case)
        assert norms.shape == (1, 33)
        want = case.run()
        for options in ({"weight_norm": norms[0]}, {"base_norm": case.base_norm()}):
            got = case.run(**options)
            for name in want:
                assert_same_bits(got[name], want[name], f"{name} with {[*options]}")


def test_scaling_as_a_tensor_and_its_sign(backend: str) -> None:
    case = dora(11, 96, 5, 3)
    for value in (2, -0.7, 0.0):
        want = changed(case, scaling=value).check()
        got = changed(case, scaling=torch.tensor(float(value))).run()
        for name in want:
            assert_same_bits(got[name], want[name], name)


def test_a_norm_near_zero(backend: str) -> None:
    # W + s B A nearly cancels: the norm is a small difference of large numbers.
    for dtype in (torch.float32, torch.bfloat16):
        case = dora(9, 40, 7, 40, dtype=dtype, base="fp32")
        weight = case.base
        assert isinstance(weight, torch.Tensor)
        A = torch.eye(40)
        for left in (0.1, 0.01):
            exact = changed(case, A=A, B=-weight.to(dtype).float() * (1 - left), scaling=1.0)
            exact.check({name: v for name, v in exact.run().items() if v.isfinite().all()})


@pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)])
def test_dimensions_of_x(backend: str, shape: tuple[int, ...]) -> None:
    flat = dora(11, 96, 1, 3, base="nested")
    for dropout_p in (0.0, 0.25):
        dataclasses.replace(
            flat, x=make_x(shape, torch.float32), grad_y=make_x((*shape[:-1], 11), torch.float32),
            dropout_p=dropout_p, seed=torch.tensor(3),
        ).check()  # fmt: skip


def test_expanded_gradients(backend: str) -> None:
    case = dora(11, 96, 5, 3)
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
            case = dora(
                200, 256, rows, 17, dtype=dtype, base="nested", bias=dtype, dropout_p=dropout_p
            )
            base_norm = case.base_norm()
            want = case.run(base_norm=base_norm)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for name, value in case.run(base_norm=base_norm).items():
                    assert_same_bits(value, want[name], f"{name}, {threads} threads")
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    case = dora(6, 96, 5, 3, base="nested", bias=torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
    with torch.autocast("cpu", dtype=dtype):
        y = case.call(leaves)
    grad_y = case.grad_y.to(dtype)
    y.backward(grad_y)
    got = {name: leaf.grad for name, leaf in leaves.items()}
    got["x"] = got["x"].to(dtype)  # it was rounded to dtype on its way
    low = dataclasses.replace(case, x=case.x.to(dtype), grad_y=grad_y)
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
)
def test_any_sizes(
    backend: str, N: int, K: int, r: int, rows: int, dtype: torch.dtype,
    adapter_dtype: torch.dtype, base: str, blocksize: int, dropout_p: float,
) -> None:  # fmt: skip
    dora(
        N, K, rows, r, dtype=dtype, adapter_dtype=adapter_dtype, base=base, blocksize=blocksize,
        dropout_p=dropout_p, seed=N + K,
    ).check()  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_full_matrix(backend: str, dtype: torch.dtype, base: str) -> None:
    shapes = ((1, 4097, 2), (127, 129, 64), (257, 1024, 16), (577, 512, 31), (2048, 96, 8))
    numbers = (1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 130)
    for (N, K, r), rows, dropout_p in some(itertools.product(shapes, numbers, (0.0, 0.05)), 6):
        dora(
            N, K, rows, r, dtype=dtype, adapter_dtype=torch.bfloat16, base=base,
            bias=dtype, dropout_p=dropout_p,
        ).check()  # fmt: skip
