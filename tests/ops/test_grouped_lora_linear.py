"""grouped_lora_linear on every backend: each row as its adapter alone would have it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import testing, weight_norm
from feinwerk.testing import assert_same_bits, assert_within, make_x
from feinwerk.testing.adapters import BASES, AdapterCase, make_adapters
from feinwerk.testing.interpreted import some

LORA, DORA, MIXED = (False,) * 3, (True,) * 3, (False, True, True)
# Sorted and not, without rows for an adapter, with rows for none, one row, no row.
INDICES = (
    (0, 0, 0, 1, 1, 2, 2),
    (2, 0, -1, 1, 1, 2, 0, -1, 0, 1, 2, 2, 2, 1, 0, 1, 0, 2),
    (1, 1, 1, -1, 1),
    (-1, -1, -1),
    (2,),
    (),
)


def grouped(
    N: int, K: int, ranks: tuple[int, ...], index: tuple[int, ...], **options: Any
) -> AdapterCase:
    options.setdefault("dora", (False,) * len(ranks))
    return make_adapters(N, K, len(index), ranks, index=index, **options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values_and_gradients(backend: str, dtype: torch.dtype, base: str) -> None:
    shapes = ((7, 97, (16, 1, 3)), (33, 130, (3, 40, 17)), (48, 576, (8, 130, 16)))
    cases = itertools.product(enumerate(shapes), enumerate(INDICES))
    for (i, (N, K, ranks)), (j, index) in some(cases, 4):
        grouped(
            N, K, ranks, index, dtype=dtype, base=base,
            dora=(LORA, MIXED, DORA)[(i + j) % 3],
            adapter_dtype=(torch.float32, torch.bfloat16)[(i + j) % 2],
            bias=(None, *testing.DTYPES)[(i + 2 * j) % 4],
            dropout_p=(0.0, 0.3)[(i + j // 2) % 2],
        ).check()  # fmt: skip


@functools.lru_cache(maxsize=64)
def alone(case: AdapterCase, i: int) -> tuple[AdapterCase, torch.Tensor]:
    """Adapter i as a call of its own over its rows, and the rows."""
    assert case.index is not None
    rows = (case.index == i).nonzero()[:, 0]
    one = dataclasses.replace(
        case, x=case.x[rows], grad_y=case.grad_y[rows], adapters=(case.adapters[i],), index=None
    )
    return one, rows


@pytest.mark.parametrize("dora", [LORA, MIXED, DORA], ids=["lora", "mixed", "dora"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equal_to_each_adapter_alone(
    backend: str, dtype: torch.dtype, dora: tuple[bool, ...]
) -> None:
    for base, index in (("nested", INDICES[1]), ("bf16", INDICES[2])):
        case = grouped(33, 130, (3, 40, 17), index, dtype=dtype, base=base, dora=dora)
        got = case.run()
        for i in range(3):
            one, rows = alone(case, i)
            mine = {"y": got["y"][rows], "x": got["x"][rows]}
            for name in ("A", "B", "magnitude"):
                if f"{name}{i}" in got:
                    mine[f"{name}0"] = got[f"{name}{i}"]
            one.check(mine)
            # And the call itself: both are within the budget, so twice that apart at most.
            for name, value in one.check().items():
                budget = 2 * one.bounds(True)[name][1]
                assert_within(mine[name], value.double(), budget, value.dtype, name)


def test_rows_without_an_adapter_are_the_base_s(backend: str) -> None:
    for dtype in testing.DTYPES:
        case = grouped(33, 130, (3, 4, 5), INDICES[1], dtype=dtype, dora=MIXED, bias=dtype)
        assert isinstance(case.base, testing.WeightCase)
        rows = case.index == -1
        y = case.run(wants=())["y"][rows]
        testing.assert_within_budget(y, case.x[rows], case.base.dense(dtype), case.bias)
        if backend != "reference":
            assert_same_bits(y, case.base.linear(case.x, case.bias)[rows])


def test_one_adapter_for_all_rows_is_the_single_call(backend: str) -> None:
    for dora in (False, True):
        for dropout_p in (0.0, 0.2):
            one = make_adapters(33, 130, 9, (5,), dora=(dora,), dropout_p=dropout_p)
            want = one.run()
            got = dataclasses.replace(one, index=torch.zeros(9, dtype=torch.int64)).run()
            for name in want:
                assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_any_order_of_the_rows(backend: str, dropout_p: float) -> None:
    # Sorted by adapter, with the order of each adapter's rows kept, it is the same call.
    case = grouped(33, 130, (3, 4, 5), INDICES[1], dora=MIXED, dropout_p=dropout_p)
    order = torch.argsort(case.index, stable=True)
    inside = dataclasses.replace(
        case, x=case.x[order], grad_y=case.grad_y[order], index=case.index[order]
    )
    want, got = inside.run(), case.run()
    for name in got:
        value = got[name][order] if name in ("x", "y") else got[name]
        assert_same_bits(value, want[name], name)


def test_an_adapter_without_rows_has_a_gradient_of_zeros(backend: str) -> None:
    for dora in (LORA, MIXED):
        for base in ("nf4", "fp32"):
            case = grouped(33, 130, (3, 4, 5), INDICES[2], base=base, dora=dora)
            got = case.check()
            for i in (0, 2):
                for name in (f"A{i}", f"B{i}", f"magnitude{i}"):
                    if name in got:
                        assert not got[name].any()


@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((3, 4), (3,)),
        ((3, 4), (3, 4)),
        ((2, 3, 4), (2,)),
        ((2, 3, 4), (2, 3)),
        ((2, 3, 4), (2, 3, 4)),
        ((), ()),
        ((0, 4), (0,)),
    ],
)
def test_an_index_for_each_batch_or_row(
    backend: str, shape: tuple[int, ...], index: tuple[int, ...]
) -> None:
    case = grouped(33, 130, (3, 4, 5), INDICES[0], dora=MIXED)
    generator = torch.Generator().manual_seed(1)
    dataclasses.replace(
        case, x=make_x((*shape, 130), torch.float32), grad_y=make_x((*shape, 33), torch.float32),
        index=torch.randint(-1, 3, index, generator=generator),
    ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_many_adapters_and_many_rows(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    index = tuple(torch.randint(-1, 12, (1100,), generator=generator).tolist())
    ranks = (1, 2, 3, 4, 8, 16, 17, 33, 5, 6, 7, 64)
    dora = tuple(i % 3 == 0 for i in range(12))
    for dropout_p in (0.0, 0.1):
        grouped(
            19, 70, ranks, index, dtype=dtype, base="nested", dora=dora, dropout_p=dropout_p
        ).check()


def test_scalings_of_any_kind(backend: str) -> None:
    case = grouped(11, 96, (3, 4, 5), INDICES[1], dora=MIXED)
    values = (0.5, 2, torch.tensor(-0.75))
    adapters = tuple(
        dataclasses.replace(one, scaling=value)
        for one, value in zip(case.adapters, values, strict=True)
    )
    dataclasses.replace(case, adapters=adapters).check()


def test_frozen_adapters(backend: str) -> None:
    case = grouped(11, 96, (3, 4, 5), INDICES[1], dora=MIXED, bias=torch.float32)
    everything = case.run()
    for wants in ({"x"}, {"A1"}, {"B0", "B2"}, {"magnitude2"}, {"bias"}, {"x", "A0", "magnitude1"}):
        got = case.run(wants)
        assert got.keys() == {"y", *wants}
        for name in got:
            assert_same_bits(got[name], everything[name], name)


def test_known_norms(backend: str) -> None:
    case = grouped(33, 130, (3, 4, 5), INDICES[1], dora=MIXED)
    weight, *tables = case.tables
    assert weight is not None
    fresh = [
        None
        if one.magnitude is None
        else weight_norm(weight, one.A, one.B, *tables, scaling=one.scaling)
        for one in case.adapters
    ]
    case.check(case.run(weight_norm=fresh))
    case.check(case.run(base_norm=case.base_norm()))


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.mul_(3)])
@pytest.mark.parametrize("index", INDICES[:2])
def test_an_output_changed_in_place(backend: str, index: tuple[int, ...], change: Any) -> None:
    case = grouped(33, 130, (3, 4, 5), index, dora=MIXED, bias=torch.float32)
    leaves = {key: leaf.requires_grad_() for key, leaf in case.leaves().items()}
    y = case.call(leaves)
    before = y.detach().clone().requires_grad_()
    change(y).backward(case.grad_y)
    change(before.clone()).backward(case.grad_y)
    got = {key: leaf.grad for key, leaf in leaves.items()}
    assert before.grad is not None
    dataclasses.replace(case, grad_y=before.grad).check({"y": before.detach(), **got})


def test_int8(backend: str) -> None:
    for dtype in testing.DTYPES:
        grouped(48, 576, (8, 130, 16), INDICES[1], dtype=dtype, dora=MIXED, compute="int8").check()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_for_any_thread_count(backend: str, dropout_p: float) -> None:
    if backend == "reference":
        return  # its matmul is torch's
    for dtype in testing.DTYPES:
        case = grouped(
            200, 256, (17, 3, 16), INDICES[1] * 5, dtype=dtype, base="nested", dora=MIXED,
            bias=dtype, dropout_p=dropout_p,
        )  # fmt: skip
        base_norm = case.base_norm()
        want = case.run(base_norm=base_norm)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for name, value in case.run(base_norm=base_norm).items():
                assert_same_bits(value, want[name], f"{name}, {threads} threads")
        torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_an_index_out_of_range(backend: str, bad: int) -> None:
    case = grouped(11, 96, (3, 4, 5), INDICES[0])
    for where in (0, 6):
        index = case.index.clone()
        index[where] = bad
        with pytest.raises(IndexError, match=r"grouped_lora_linear: adapter_index must be in \[-1"):
            dataclasses.replace(case, index=index).run()


def test_autocast(backend: str) -> None:
    case = grouped(11, 96, (3, 4, 5), INDICES[1], dora=MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.run(wants=())["y"]
    low = dataclasses.replace(case, x=case.x.bfloat16(), grad_y=case.grad_y.bfloat16())
    low.check({"y": y})


@given(
    N=st.integers(1, 60),
    K=st.integers(1, 150),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rows=st.lists(st.integers(-1, 4), max_size=20),
    magnitudes=st.lists(st.booleans(), min_size=5, max_size=5),
    dtype=st.sampled_from(testing.DTYPES),
    base=st.sampled_from(BASES),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_any_batch(
    backend: str, N: int, K: int, ranks: list[int], rows: list[int], magnitudes: list[bool],
    dtype: torch.dtype, base: str, dropout_p: float,
) -> None:  # fmt: skip
    index = tuple(min(row, len(ranks) - 1) for row in rows)
    grouped(
        N, K, tuple(ranks), index, dtype=dtype, base=base, dora=tuple(magnitudes[: len(ranks)]),
        dropout_p=dropout_p,
    ).check()  # fmt: skip
