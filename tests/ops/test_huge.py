"""More than 2^31 elements in real memory: only the last rows differ from zero and are looked at.

The tests of the single ops cover the same sizes by arithmetic on shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from feinwerk import nf4_dequantize, nf4_embedding, nf4_linear, nf4_linear_backward, nf4_quantize
from feinwerk.testing import (
    WeightCase,
    assert_same_bits,
    assert_within_budget,
    backend_ids,
    make_weight,
    make_x,
    use_backend,
)

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
