"""NF4Linear: values and gradients against fp64, construction, copies, compile, checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from feinwerk import NF4Weight
from feinwerk.nn import NF4Linear
from feinwerk.testing import (
    DTYPES,
    assert_same_bits,
    assert_within_budget,
    make_x,
)


def make(
    N: int = 12,
    K: int = 33,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), **kwargs)


def assert_gradients(layer: NF4Linear, x: torch.Tensor) -> None:
    """Forward and every gradient against fp64, for the one weight that both must see."""
    x = x.clone().requires_grad_()
    y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], layer.out_features)
    w = layer.dequantize(x.dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    flat = x.detach().reshape(-1, layer.in_features)
    assert_within_budget(y.detach().reshape(-1, layer.out_features), flat, w, bias)
    grad_y = make_x(tuple(y.shape), x.dtype, seed=2)
    y.backward(grad_y)
    assert x.grad is not None
    rows = grad_y.reshape(-1, layer.out_features)
    assert_within_budget(x.grad.reshape(flat.shape), rows, w.t().contiguous())
    if layer.bias is not None:
        assert layer.bias.grad is not None
        truth = rows.double().sum(0)
        error = (layer.bias.grad.double() - truth).abs()
        eps = torch.finfo(layer.bias.dtype).eps
        slack = rows.double().abs().sum(0) * len(rows) * 2.0**-24
        assert (error <= eps * truth.abs() + slack).all()
    assert layer.weight.grad is None


class TestForwardAndGradients:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_against_fp64(self, dtype: torch.dtype, double_quant: bool, bias: bool) -> None:
        layer = make(40, 130, bias=bias, double_quant=double_quant)
        for shape in [(130,), (7, 130), (2, 9, 130), (2, 1, 3, 130)]:
            layer.zero_grad()
            assert_gradients(layer, make_x(shape, dtype))

    @given(
        N=st.integers(1, 70), K=st.integers(1, 150), M=st.integers(1, 40),
        blocksize=st.sampled_from([32, 64, 256, 4096]), double_quant=st.booleans(),
        dtype=st.sampled_from(DTYPES), bias=st.booleans(),
    )  # fmt: skip
    def test_any_size(
        self, N: int, K: int, M: int, blocksize: int, double_quant: bool, dtype: torch.dtype,
        bias: bool,
    ) -> None:  # fmt: skip
        layer = make(N, K, bias=bias, blocksize=blocksize, double_quant=double_quant)
        assert_gradients(layer, make_x((M, K), dtype, seed=M))

    def test_zero_rows(self) -> None:
        x = torch.zeros(3, 0, 33, requires_grad=True)
        y = make()(x)
        assert y.shape == (3, 0, 12)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape

    def test_int8_forward_has_the_exact_gradient(self) -> None:
        layer = make(40, 128, compute="int8")
        exact = make(40, 128)
        x = make_x((4, 128), torch.float32)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(a), exact(b)
        assert not torch.equal(y, z)
        assert torch.allclose(y, z, atol=0.05)
        y.backward(torch.ones_like(y))
        z.backward(torch.ones_like(z))
        assert a.grad is not None
        assert b.grad is not None
        assert_same_bits(a.grad, b.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype: torch.dtype) -> None:
        layer = make()
        x = make_x((5, 33), torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_same_bits(y.detach(), layer(x.detach().to(dtype)))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant: bool) -> None:
        block = nn.Sequential(make(33, 33), nn.GELU(), make(12, 33))
        results = []
        for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
            block.zero_grad()
            x = make_x((5, 33), torch.float32).requires_grad_()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_bits(a, b)

    def test_compile_has_no_graph_break_and_the_same_bits(self) -> None:
        layer = make(40, 128)
        compiled = torch.compile(layer, fullgraph=True)
        for shape in [(4, 128), (2, 3, 128)]:
            a = make_x(shape, torch.float32).requires_grad_()
            b = a.detach().clone().requires_grad_()
            y, z = layer(a), compiled(b)
            assert_same_bits(z.detach(), y.detach())
            y.sum().backward()
            z.sum().backward()
            assert a.grad is not None
            assert b.grad is not None
            assert_same_bits(b.grad, a.grad)

    def test_compile_after_a_cast_written_around_the_module(self) -> None:
        layer = make(40, 128)
        before = layer.nf4_weight
        for p in layer.parameters():
            p.data = p.data.to(torch.bfloat16)
        x = make_x((4, 128), torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert_same_bits(compiled, layer(x))
        assert_same_bits(layer.nf4_weight.packed.detach(), before.packed.detach())

    def test_functional_call_and_vmap_free_jvp(self) -> None:
        layer = make()
        x = make_x((5, 33), torch.float32)
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        y = torch.func.functional_call(layer, {**state, "bias": torch.zeros(12)}, (x,))
        assert layer.bias is not None
        assert torch.allclose(y + layer.bias, layer(x))


class TestConstruction:
    def test_from_linear_is_from_dense(self) -> None:
        linear = nn.Linear(33, 12, dtype=torch.bfloat16).eval()
        layer = NF4Linear.from_linear(linear, blocksize=128, rule="cuda")
        expected = NF4Weight.from_dense(linear.weight, blocksize=128, rule="cuda")
        assert_same_bits(layer.weight.detach().view(-1), expected.packed)
        assert_same_bits(layer.absmax, expected.absmax)
        assert layer.bias is linear.bias
        assert not layer.training
        assert (layer.dtype, layer.blocksize, layer.double_quant) == (torch.bfloat16, 128, True)
        assert linear.weight.dtype == torch.bfloat16

    def test_looks_like_a_frozen_linear(self) -> None:
        layer = make()
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer.weight, nn.Parameter)
        assert type(layer.weight) is nn.Parameter
        assert (layer.weight.dtype, layer.weight.device.type) == (torch.uint8, "cpu")
        assert layer.weight.shape == (12 * 33 // 2, 1)
        assert not layer.weight.requires_grad
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert layer.bias is not None
        assert layer.bias.requires_grad
        assert repr(layer) == (
            "NF4Linear(in_features=33, out_features=12, bias=True, blocksize=64, "
            "double_quant=True, dtype=torch.float32)"
        )
        assert repr(make(bias=False, compute="int8")).endswith("compute=int8)")
        with pytest.raises(RuntimeError, match="floating point"):
            layer.requires_grad_(True)

    def test_an_empty_layer_is_zero(self) -> None:
        for double_quant in (False, True):
            layer = NF4Linear(33, 12, double_quant=double_quant)
            assert_same_bits(layer.dequantize(), torch.zeros(12, 33))
            assert not layer(torch.ones(33)).any()
        with torch.device("meta"):
            assert NF4Linear(33, 12)(torch.ones(2, 33)).shape == (2, 12)
        assert NF4Linear(8, 4, dtype=torch.float16).bias.dtype == torch.float16

    def test_default_dtype_does_not_reach_the_tables(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = NF4Linear(33, 12)
            quantized = NF4Linear.from_linear(nn.Linear(33, 12))
        finally:
            torch.set_default_dtype(torch.float32)
        for each in (layer, quantized):
            assert each.dtype == torch.bfloat16
            assert each.nested_absmax is not None
            assert each.nested_absmax.dtype == torch.float32
            assert each.nf4_weight.nested_codebook.dtype == torch.float32

    def test_shares_the_tensors_of_a_weight(self) -> None:
        w = NF4Weight.from_dense(torch.randn(12, 33))
        layer = NF4Linear.from_weight(w, torch.zeros(12))
        assert layer.weight.data_ptr() == w.packed.data_ptr()
        assert layer.absmax is w.absmax
        assert isinstance(layer.bias, nn.Parameter)

    def test_to_linear_gives_the_dense_layer_back(self) -> None:
        layer = make().eval()
        dense = layer.to_linear()
        assert type(dense) is nn.Linear
        assert_same_bits(dense.weight.detach(), layer.dequantize())
        assert dense.bias is layer.bias
        assert not dense.training
        assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16

    def test_rejections(self) -> None:
        w = NF4Weight.from_dense(torch.randn(12, 33))
        for call, error, message in [
            (lambda: NF4Linear.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "be a dense torch.nn"),
            (lambda: NF4Linear.from_linear(make()), TypeError, "be a dense torch.nn.Linear"),
            (lambda: NF4Linear.from_linear(nn.Linear(2, 2).double()), TypeError, "weight must be"),
            (lambda: NF4Linear.from_weight(w, torch.zeros(33)), ValueError, r"shape \(12,\)"),
            (
                lambda: NF4Linear.from_weight(NF4Weight.from_dense(torch.ones(5))),
                ValueError,
                r"weight must have shape \(N, K\)",
            ),
            (lambda: NF4Linear(0, 3), ValueError, "columns must be at least 1"),
            (lambda: NF4Linear(3, 3, blocksize=63), ValueError, "blocksize must be one of"),
            (lambda: NF4Linear(3, 3, dtype=torch.float64), TypeError, "dtype must be"),
            (lambda: NF4Linear(3, 3, compute="fast"), ValueError, "compute must be"),
            (lambda: make()(torch.ones(2, 34)), ValueError, "x must have last dimension K = 33"),
            (lambda: make()(torch.ones(33).double()), TypeError, "x must be torch.float32"),
            (lambda: make().reset_parameters(), NotImplementedError, "load a checkpoint"),
        ]:
            with pytest.raises(error, match=message):
                call()


class TestCopies:
    def test_every_way_keeps_every_bit(self) -> None:
        layer = make().half().eval()
        x = make_x((3, 33), torch.float16)

        def saved() -> NF4Linear:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved()]
        for other in copies:
            assert other.dtype == torch.float16
            assert not other.training
            assert type(other.weight) is nn.Parameter
            assert not other.weight.requires_grad
            assert other.weight.data_ptr() != layer.weight.data_ptr()
            assert_same_bits(other(x).detach(), layer(x).detach())
            for (name, a), b in zip(
                layer.state_dict().items(), other.state_dict().values(), strict=True
            ):
                assert_same_bits(b, a, name)
