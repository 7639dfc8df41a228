"""Merging weights: the sum against fp64, the reported error, tensors that come back unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from feinwerk import NF4Weight
from feinwerk.nn import NF4Linear
from feinwerk.nn.merge import merged_weight, restore_weight, store, swap_weight
from feinwerk.testing import DTYPES, assert_same_bits, make_x, ulp

EPS = 2.0**-24  # half a unit in the last place of fp32, relative


def assert_is_sum(
    got: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    gain: torch.Tensor | None = None,
) -> None:
    """One rounding of s B, of each of the r products and sums, of the last sum, of the gain."""
    sum_, size = B.double() @ A.double(), B.double().abs() @ A.double().abs()
    truth = W.double() + scaling * sum_
    bound = (A.shape[0] + 3) * EPS * (abs(scaling) * size + W.double().abs())
    if gain is not None:
        truth, bound = gain.double()[:, None] * truth, gain.double().abs()[:, None] * bound
    bound = bound + ulp(truth, torch.float32)
    assert ((got.double() - truth).abs() <= bound).all()


@given(
    N=st.integers(1, 40), K=st.integers(1, 70), r=st.integers(1, 48),
    dtype=st.sampled_from(DTYPES), adapter=st.sampled_from(DTYPES), nf4=st.booleans(),
    dora=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_the_sum(
    N: int, K: int, r: int, dtype: torch.dtype, adapter: torch.dtype, nf4: bool, dora: bool,
    transposed: bool,
) -> None:  # fmt: skip
    shape = (K, N) if transposed else (N, K)
    held: Any = make_x(shape, dtype, seed=N)
    A, B = make_x((r, K), adapter, seed=2), make_x((N, r), adapter, seed=3)
    gain = torch.rand(N, generator=torch.Generator().manual_seed(4)) if dora else None
    if nf4:
        held = NF4Weight.from_dense(held)
    before = held.dequantize(torch.float32) if nf4 else held.clone()
    got = merged_weight(held, A, B, scaling=0.75, gain=gain, transposed=transposed)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert got.shape == shape
    turn = torch.t if transposed else torch.Tensor.contiguous
    assert_is_sum(turn(got), turn(before.float()), A, B, 0.75, gain)
    assert_same_bits(held.dequantize(torch.float32) if nf4 else held, before)


def test_a_weight_that_is_not_contiguous_and_a_scaling_tensor() -> None:
    W = make_x((6, 4), torch.float32).t()
    A, B = make_x((2, 6), torch.float32, seed=2), make_x((4, 2), torch.float32, seed=3)
    got = merged_weight(W, A, B, scaling=torch.tensor(2.0))
    assert got.is_contiguous()
    assert_is_sum(got, W, A, B, 2.0)


def test_a_convolution() -> None:
    W = make_x((5, 3, 2, 2), torch.float32)
    A, B = make_x((4, 3, 2, 2), torch.float32, seed=2), make_x((5, 4, 1, 1), torch.float32, seed=3)
    got = merged_weight(W, A, B, scaling=0.5)
    assert got.shape == W.shape
    assert_is_sum(got.flatten(1), W.flatten(1), A.flatten(1), B.flatten(1), 0.5)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_the_error_of_storing_in_nf4(double_quant: bool, blocksize: int) -> None:
    exact = make_x((33, 70), torch.float32)
    like = NF4Weight.from_dense(exact.bfloat16(), blocksize=blocksize, double_quant=double_quant)
    stored, report = store(exact, like)
    assert (stored.blocksize, stored.double_quant) == (blocksize, double_quant)
    assert stored.dtype == torch.bfloat16
    error = stored.dequantize(torch.float32) - exact
    assert report.max_error == float(error.abs().max())
    sizes = float(torch.linalg.norm(error)), float(torch.linalg.norm(exact))
    assert report.relative_error == sizes[0] / sizes[1]
    assert 0 < report.relative_error < 0.2
    assert str(report).startswith("max error ")


def test_what_nf4_holds_exactly_costs_nothing() -> None:
    like = NF4Weight.from_dense(make_x((8, 64), torch.float32), double_quant=False)
    stored, report = store(like.dequantize(), like)
    assert report.max_error == report.relative_error == 0
    assert_same_bits(stored.packed, like.packed)
    assert store(torch.zeros(8, 64), like)[1].relative_error == 0


def test_the_error_of_rounding() -> None:
    exact = make_x((8, 64), torch.float32)
    same, report = store(exact, torch.float32)
    assert same is exact
    assert report.max_error == report.relative_error == 0
    before = exact.clone()
    rounded, report = store(exact, torch.bfloat16)
    assert_same_bits(rounded, before.bfloat16())
    assert_same_bits(exact, before)
    assert report.max_error == float((rounded.float() - exact).abs().max()) > 0


@pytest.mark.parametrize("kind", ["nf4", "dense", "tied"])
def test_the_same_tensors_come_back(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(33, 12)
    if kind == "nf4":
        layer = NF4Linear.from_linear(layer)
    neighbour = nn.Linear(33, 12)
    if kind == "tied":
        neighbour.weight = layer.weight
    x = make_x((3, 33), torch.float32)
    before, weight, bias = layer(x).detach(), layer.weight, layer.bias
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    other = neighbour(x).detach()
    A, B = make_x((4, 33), torch.float32, seed=2), make_x((12, 4), torch.float32, seed=3)
    source = layer.nf4_weight if kind == "nf4" else layer.weight
    new, _ = store(
        merged_weight(source, A, B, scaling=1.0), source if kind == "nf4" else torch.float32
    )
    kept = swap_weight(layer, new, layer.bias + 1)
    assert (layer(x) - before).abs().max() > 1
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert_same_bits(neighbour(x).detach(), other)
    restore_weight(layer, kept)
    assert layer.weight is weight
    assert layer.bias is bias
    assert_same_bits(layer(x).detach(), before)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, state[key], key)


def test_what_comes_back_follows_a_cast_but_not_its_codes() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(33, 12)
    layers: list[Any] = [dense, NF4Linear.from_linear(dense)]
    for layer in layers:
        expected = copy.deepcopy(layer).bfloat16()
        source = layer.nf4_weight if isinstance(layer, NF4Linear) else torch.zeros(12, 33)
        kept = swap_weight(layer, source, torch.zeros(12))
        layer.bfloat16()
        restore_weight(layer, kept)
        for key, value in expected.state_dict().items():
            assert_same_bits(layer.state_dict()[key], value, key)
        if isinstance(layer, NF4Linear):
            assert layer.dtype == torch.bfloat16


def test_rejections() -> None:
    with pytest.raises(ValueError, match=r"merge: adapter must fit the weight's \[N, K\] = \[3, 4"):
        merged_weight(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(4, 2), scaling=1.0)
    with pytest.raises(ValueError, match=r"must be finite .*, got 2 bad elements"):
        store(torch.tensor([1.0, torch.nan, torch.inf]), torch.float32)
    with pytest.raises(TypeError, match="weight must be in the format of the layer, got Tensor"):
        swap_weight(NF4Linear(64, 8), torch.zeros(8, 64))
    with pytest.raises(ValueError, match="bias must be None for a layer without one"):
        swap_weight(nn.Linear(64, 8, bias=False), torch.zeros(8, 64), torch.zeros(8))
