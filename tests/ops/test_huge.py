"""More than 2^31 elements in real memory: only the last rows differ from zero and are looked at.

The tests of the single ops cover the same sizes by arithmetic on shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from feinwerk import (
    dora_linear,
    nf4_dequantize,
    nf4_embedding,
    nf4_linear,
    nf4_linear_backward,
    nf4_quantize,
)
from feinwerk.testing import (
    WeightCase,
    assert_same_bits,
    assert_within_budget,
    backend_ids,
    make_weight,
    make_x,
    use_backend,
)
from feinwerk.testing.adapters import Adapter, AdapterCase

pytestmark = pytest.mark.full

N, K, ROWS = 2**16, 2**15 + 1, 2
COUNT = N * K
NATIVE = backend_ids()[1:]
BEST = NATIVE[-1:]


class Huge(NamedTuple):
    """A weight of N x K whose last ROWS rows are `dense`, all others zero."""

    tables: tuple[torch.Tensor | None, ...]
    dense: torch.Tensor


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def huge(request: pytest.FixtureRequest) -> Huge:
    # A small weight is laid over the end, at a block boundary: its first `shift` elements belong
    # to the row before, which nobody reads.
    start = (N - ROWS) * K
    aligned = start // 64 * 64
    shift = start - aligned
    small = make_weight(1, ROWS * K + shift, double_quant=request.param, seed=5)
    assert (aligned + small.K) == COUNT > 2**31
    packed = torch.full(((COUNT + 1) // 2,), 0x77, dtype=torch.uint8)
    packed[aligned // 2 :] = small.packed
    absmax = torch.zeros(-(-COUNT // 64), dtype=small.absmax.dtype)
    absmax[aligned // 64 :] = small.absmax
    nested, case = small.nested, small
    if nested[0] is not None and nested[1] is not None and nested[2] is not None:
        scale = nested[0].amax()
        decoded = nested[1][small.absmax.int()] * scale + nested[2]
        nested = (scale.repeat(-(-absmax.numel() // 256)), nested[1], nested[2])
        case = WeightCase(1, small.K, 64, small.packed, decoded, (None, None, None))
    return Huge((packed, absmax, *nested), case.dense()[0, shift:].view(ROWS, K))


def test_embedding(backend: str, huge: Huge) -> None:
    got = nf4_embedding(torch.tensor([N - 2, N - 1]), *huge.tables, N=N, K=K)
    assert_same_bits(got, huge.dense)


@pytest.mark.parametrize("name", NATIVE)
def test_linear(name: str, huge: Huge) -> None:
    packed, absmax, *nested = huge.tables
    x = make_x((1, K), torch.float32)
    with use_backend(name):
        y = nf4_linear(x, packed, absmax, None, *nested, N=N, K=K)
    assert_within_budget(y[:, -ROWS:], x, huge.dense)


@pytest.mark.parametrize("name", BEST)
def test_linear_backward(name: str, huge: Huge) -> None:
    grad_y = torch.zeros(1, N)
    grad_y[:, -ROWS:] = make_x((1, ROWS), torch.float32)
    with use_backend(name):
        grad_x = nf4_linear_backward(grad_y, *huge.tables, N=N, K=K)
    assert_within_budget(grad_x, grad_y[:, -ROWS:], huge.dense.t())


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("rows", [1, 5])
def test_dora_linear(name: str, huge: Huge, rows: int) -> None:
    # Rows of W that are zero have a gain of zero: A and B meet the last rows only.
    x, A = make_x((rows, K), torch.float32), make_x((3, K), torch.float32)
    B, magnitude, base_norm = torch.zeros(N, 3), torch.zeros(N), torch.zeros(N)
    B[-ROWS:] = make_x((ROWS, 3), torch.float32)
    magnitude[-ROWS:] = base_norm[-ROWS:] = huge.dense.norm(dim=1)
    grad_y = torch.zeros(rows, N)
    grad_y[:, -ROWS:] = make_x((rows, ROWS), torch.float32)
    for leaf in (x, A, B, magnitude):
        leaf.requires_grad_()
    weight, absmax, *nested = huge.tables
    nf4 = dict(zip(("nested_absmax", "nested_codebook", "nested_offset"), nested, strict=True))
    with use_backend(name):
        y = dora_linear(
            x, weight, A, B, magnitude, absmax=absmax, **nf4, base_norm=base_norm, scaling=0.5
        )
        y.backward(grad_y)
    part = Adapter(A.detach(), B[-ROWS:].detach(), 0.5, magnitude[-ROWS:].detach())
    case = AdapterCase(x.detach(), huge.dense, (part,), grad_y[:, -ROWS:])
    got = {"x": x.grad, "A0": A.grad, "B0": B.grad[-ROWS:], "magnitude0": magnitude.grad[-ROWS:]}
    case.check({"y": y[:, -ROWS:].detach(), **got})


@pytest.mark.parametrize("name", BEST)
def test_dequantize(name: str, huge: Huge) -> None:
    with use_backend(name):
        dense = nf4_dequantize(*huge.tables, shape=(N, K), dtype=torch.bfloat16)
    assert_same_bits(dense[-ROWS:], huge.dense.bfloat16())


@pytest.mark.parametrize("name", BEST)
def test_quantize(name: str) -> None:
    weight = torch.zeros(COUNT, dtype=torch.bfloat16)
    tail = make_x((64 * 1000,), torch.bfloat16)
    weight[-tail.numel() :] = tail
    assert COUNT % 64 == 0
    with use_backend(name):
        packed, absmax = nf4_quantize(weight)
        expected, expected_absmax = nf4_quantize(tail)
    assert_same_bits(packed[-expected.numel() :], expected)
    assert_same_bits(absmax[-1000:], expected_absmax)
    assert packed[: -expected.numel()].eq(0x77).all()
