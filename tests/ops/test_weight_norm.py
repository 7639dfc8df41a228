"""weight_norm and row_norms on every backend: against fp64, exact where it must be, and edges."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import _library, _native, row_norms, testing, weight_norm
from feinwerk.codebook import BLOCKSIZES
from feinwerk.testing import assert_same_bits, assert_within, make_weight, make_x, ulp
from feinwerk.testing.adapter_budget import norm_truth
from feinwerk.testing.adapters import BASES, BF16_ISAS, AdapterCase, make_adapters

OP = torch.ops.feinwerk.weight_norm.default
# Schemas and fakes do not depend on the instruction set.
FIRST_AND_BEST = testing.backend_ids()[:: max(1, len(testing.backend_ids()) - 1)]
SHAPES = ((1, 1, 1), (7, 97, 16), (33, 130, 17), (64, 64, 3), (48, 576, 130), (5, 1100, 300))


def norm_of(case: AdapterCase, **options: Any) -> torch.Tensor:
    weight, *tables = case.tables
    one = case.adapters[0]
    assert weight is not None
    options = {"scaling": one.scaling, "blocksize": case.blocksize, **options}
    return weight_norm(weight, one.A, one.B, *tables, **options)


def check(case: AdapterCase, dtype: torch.dtype | None = None) -> torch.Tensor:
    one = case.adapters[0]
    W = case.dense(dtype)
    split = (
        W.dtype is torch.bfloat16
        and _library.forced_backend() == "cpp"
        and _native.isa() in BF16_ISAS
    )
    truth, error = norm_truth(W, W.double().norm(dim=1), one.A, one.B, one.s, split=split)
    got = norm_of(case, dtype=dtype)
    assert_within(got, truth, error + ulp(truth, torch.float32), torch.float32)
    return got


@pytest.mark.parametrize("adapter_dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_values(backend: str, base: str, adapter_dtype: torch.dtype) -> None:
    for i, (N, K, r) in enumerate(SHAPES):
        case = make_adapters(N, K, 0, (r,), base=base, adapter_dtype=adapter_dtype)
        for dtype in (None, testing.DTYPES[i % 3]):
            check(case, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(backend: str, blocksize: int) -> None:
    for K in (96, 577, 4160):
        check(make_adapters(5, K, 0, (3,), base="nested", blocksize=blocksize))


@pytest.mark.parametrize("base", BASES)
def test_exactly_the_base_norm_without_an_adapter(backend: str, base: str) -> None:
    for N, K, r in SHAPES[1:4]:
        case = make_adapters(N, K, 0, (r,), base=base)
        weight, *tables = case.tables
        A, B = case.adapters[0].A, case.adapters[0].B
        for dtype in testing.DTYPES:
            options = {"base_norm": case.base_norm(), "dtype": dtype}
            for args in ((A, torch.zeros_like(B)), (torch.zeros_like(A), B)):
                assert_same_bits(weight_norm(weight, *args, *tables, **options), case.base_norm())
            got = weight_norm(weight, A, B, *tables, scaling=0.0, **options)
            assert_same_bits(got, case.base_norm())


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_a_small_change_is_not_lost(backend: str, size: float) -> None:
    # n / n0 - 1 is about `size`: the norm's rounding is half an ulp of n, not of n^2.
    case = make_adapters(33, 256, 0, (4,), base="fp32")
    one = case.adapters[0]
    W, n0 = case.dense(), case.base_norm()
    got = weight_norm(W, one.A, one.B * size, scaling=one.scaling, base_norm=n0)
    truth, _ = norm_truth(W, n0, one.A, one.B * size, one.s)
    change = (truth / n0.double() - 1).abs().max()
    assert change > size / 100
    assert ((got.double() - truth).abs() <= 2 * ulp(truth, torch.float32)).all()


def test_zero_rows(backend: str) -> None:
    case = make_adapters(33, 96, 0, (4,), base="fp32")
    one, W = case.adapters[0], case.dense().clone()
    W[[3, 4]] = 0
    B = one.B.clone()
    B[4] = 0
    got = weight_norm(W, one.A, B, scaling=2.0)
    truth, error = norm_truth(W, row_norms(W), one.A, B, 2.0)
    assert_within(got, truth, error + ulp(truth, torch.float32), torch.float32)
    assert got[3] > 0
    assert got[4] == 0


def test_a_difference_of_large_numbers(backend: str) -> None:
    W, A = make_x((9, 40), torch.float32), torch.eye(40)
    for left in (1.0, 0.1, 1e-3, 0.0):
        B = -W * (1 - left)
        truth, error = norm_truth(W, W.double().norm(dim=1), A, B, 1.0)
        got = weight_norm(W, A, B)
        assert_within(got, truth, error + ulp(truth, torch.float32), torch.float32)


def test_scaling_and_base_norm(backend: str) -> None:
    case = make_adapters(33, 130, 0, (5,), base="nested")
    for value in (2, -0.7, 1e-3):
        want = norm_of(case, scaling=value)
        for dtype in (torch.float32, torch.float64):
            got = norm_of(case, scaling=torch.tensor(float(value), dtype=dtype))
            assert_same_bits(got, want)
        assert_same_bits(norm_of(case, scaling=value, base_norm=case.base_norm()), want)


def test_it_is_a_constant_for_autograd(backend: str) -> None:
    case = make_adapters(33, 130, 0, (5,), base="fp32")
    A, B = (t.clone().requires_grad_() for t in (case.adapters[0].A, case.adapters[0].B))
    scaling = torch.tensor(0.5, requires_grad=True)
    norm = weight_norm(case.dense().clone().requires_grad_(), A, B, scaling=scaling)
    assert not norm.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(weight_norm(case.dense(), A, B, scaling=scaling), norm)


def test_strides(backend: str) -> None:
    case = make_adapters(33, 130, 0, (5,), base="fp32")
    W, A, B = case.dense(), case.adapters[0].A, case.adapters[0].B
    n0 = row_norms(W)  # torch's sum over a strided W has another order
    want = weight_norm(W, A, B, base_norm=n0)
    for args in (
        (W.t().contiguous().t(), A, B),
        (W, A.t().contiguous().t(), B),
        (W, A, B.t().contiguous().t()),
        (W, A, B.repeat_interleave(2, dim=1)[:, ::2]),
    ):
        got = weight_norm(*args, base_norm=n0)
        truth, error = norm_truth(W, n0, A, B, 1.0)
        assert_within(got, truth, error + ulp(truth, torch.float32), torch.float32)
        if backend != "reference":
            assert_same_bits(got, want)


def test_same_bits_for_any_thread_count(backend: str) -> None:
    if backend == "reference":
        return  # its matmul is torch's
    for base in ("nested", "bf16"):
        case = make_adapters(200, 300, 0, (17,), base=base)
        for dtype in testing.DTYPES:
            options = {"base_norm": case.base_norm(), "dtype": dtype}
            want = norm_of(case, **options)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert_same_bits(norm_of(case, **options), want)
            torch.set_num_threads(1)


@given(
    N=st.integers(1, 80),
    K=st.integers(1, 300),
    r=st.integers(1, 90),
    base=st.sampled_from(BASES),
    blocksize=st.sampled_from(BLOCKSIZES),
    adapter_dtype=st.sampled_from(testing.DTYPES),
    dtype=st.sampled_from([None, *testing.DTYPES]),
)
def test_any_sizes(
    backend: str, N: int, K: int, r: int, base: str, blocksize: int, adapter_dtype: torch.dtype,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    check(
        make_adapters(
            N, K, 0, (r,), base=base, blocksize=blocksize, adapter_dtype=adapter_dtype, seed=N + K
        ),
        dtype,
    )


def test_row_norms_are_torch_s(backend: str) -> None:
    for dtype in testing.DTYPES:
        W = make_x((37, 130), dtype)
        assert_same_bits(row_norms(W), torch.linalg.norm(W.float(), dim=1))
        columns = W.t().contiguous().t()
        assert_same_bits(row_norms(columns), torch.linalg.norm(columns.float(), dim=1))
        want = torch.linalg.norm(W.bfloat16().float(), dim=1)
        assert_same_bits(row_norms(W, dtype=torch.bfloat16), want)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_row_norms_of_nf4(backend: str, blocksize: int, double_quant: bool) -> None:
    # The last ones are more than one slab, with rows that begin inside a byte and a block.
    for N, K in ((1, 1), (7, 97), (33, 130), (300, 4099), (1100, 1023)):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        for dtype in (None, torch.bfloat16):
            got = row_norms(*weight.tables, shape=(N, K), blocksize=blocksize, dtype=dtype)
            dense = weight.dense(torch.float32 if dtype is None else dtype)
            truth = dense.double().norm(dim=1)
            error = 4 * math.sqrt(K) * 2.0**-24 * truth
            assert_within(got, truth, error, torch.float32)
            if N * K < 1 << 20:
                assert_same_bits(got, torch.linalg.norm(dense.float(), dim=1))


@pytest.mark.parametrize("name", FIRST_AND_BEST)
def test_opcheck(name: str) -> None:
    for base in ("nested", "fp32"):
        case = make_adapters(6, 96, 0, (3,), base=base)
        one = case.adapters[0]
        args = (*case.tables, one.A, one.B, torch.tensor(0.5), case.base_norm())
        with testing.use_backend(name):
            torch.library.opcheck(OP, args, {"dtype": torch.bfloat16})


@pytest.mark.parametrize("name", FIRST_AND_BEST)
def test_compile_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    for base in ("nested", "fp32"):
        case = make_adapters(6, 96, 0, (3,), base=base)
        base_norm = case.base_norm()
        compiled = torch.compile(
            lambda case=case, n0=base_norm: norm_of(case, base_norm=n0) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        with testing.use_backend(name):
            assert_same_bits(compiled(), norm_of(case, base_norm=base_norm) * 2)


A, B, W = torch.ones(2, 96), torch.ones(6, 2), torch.ones(6, 96)
NF4 = make_weight(6, 96)
FLOATS = "be torch.float32, torch.bfloat16 or torch.float16"
FITS = "weight must have shape (N, K) = (6, 96) as lora_B and lora_A say"
REJECTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": [1]}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"lora_A": 1}, TypeError, "lora_A must be a torch.Tensor, got int"),
    ({"lora_B": None}, TypeError, "lora_B must be a torch.Tensor, got NoneType"),
    ({"lora_A": A.double()}, TypeError, f"lora_A must {FLOATS}, got torch.float64"),
    ({"lora_B": B.int()}, TypeError, f"lora_B must {FLOATS}, got torch.int32"),
    ({"weight": W.double()}, TypeError, f"weight must {FLOATS}, got torch.float64"),
    ({"weight": W[:, 1:]}, ValueError, f"{FITS}, got (6, 95)"),
    ({"weight": W[1:]}, ValueError, f"{FITS}, got (5, 96)"),
    ({"weight": W[0]}, ValueError, f"{FITS}, got (96,)"),
    (
        {"lora_B": B[:, :1]},
        ValueError,
        "lora_A and lora_B must be (r, K) and (N, r), got (2, 96) and (6, 1)",
    ),
    ({"dtype": torch.int8}, TypeError, f"dtype must {FLOATS}, got torch.int8"),
    (
        {"base_norm": torch.ones(5)},
        ValueError,
        "base_norm must be float32 of shape (6,), got torch.float32 (5,)",
    ),
    (
        {"base_norm": torch.ones(6).half()},
        ValueError,
        "base_norm must be float32 of shape (6,), got torch.float16 (6,)",
    ),
    (
        {"scaling": torch.ones(2)},
        ValueError,
        "scaling must be a float or a 0-dim tensor, got torch.float32 with 1 dimensions",
    ),
    (
        {"lora_A": A.to("meta")},
        ValueError,
        "lora_A must be on cpu like the other tensors, got meta",
    ),
    (
        {"weight": NF4.packed[1:], "absmax": NF4.absmax},
        ValueError,
        "weight must have 288 elements, got 287",
    ),
    (
        {"weight": NF4.packed, "absmax": NF4.absmax, "blocksize": 65},
        ValueError,
        f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got 65",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REJECTED, ids=[m for _, _, m in REJECTED])
def test_rejected(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weight": W, "lora_A": A, "lora_B": B, "base_norm": torch.ones(6), **change}
    with pytest.raises(error, match=f"^{re.escape(f'weight_norm: {message}')}$"):
        weight_norm(**arguments)


def test_row_norms_rejects() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weight": 1}, TypeError, "weight must be a torch.Tensor, got int"),
        ({"weight": NF4.packed}, TypeError, f"weight must {FLOATS}, got torch.uint8"),
        ({"weight": W[0]}, ValueError, "weight must have 2 dimensions, got 1"),
        ({"weight": W, "dtype": torch.int8}, TypeError, f"dtype must {FLOATS}, got torch.int8"),
    ]
    nf4 = {"weight": NF4.packed, "absmax": NF4.absmax}
    cases += [
        (nf4, ValueError, "shape must be given for an NF4 weight, got None"),
        ({**nf4, "shape": (5, 96)}, ValueError, "weight must have 240 elements, got 288"),
        ({**nf4, "shape": (0, 96)}, ValueError, "shape must be at least 1, got 0"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=f"^{re.escape(f'row_norms: {message}')}$"):
            row_norms(**arguments)


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    N, K, r = 2**17 + 1, 2**14 + 2, 3
    packed = torch.empty(N * K // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-N * K // 64), device="meta")
    A, B = torch.empty(r, K, device="meta"), torch.empty(N, r, device="meta")
    n0, s = torch.empty(N, device="meta"), torch.empty((), device="meta")
    out = OP(packed, absmax, None, None, None, A, B, s, n0)
    assert out.shape == (N,)
    with pytest.raises(ValueError, match=f"absmax must have {-(-N * K // 64)} elements"):
        OP(packed, absmax[:-1], None, None, None, A, B, s, n0)
    assert OP(torch.empty(N, K, device="meta"), *[None] * 4, A, B, s, n0).shape == (N,)
