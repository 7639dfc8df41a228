"""nf4_linear's gradients on every backend, and nf4_linear_backward itself, against fp64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from feinwerk import nf4_linear_backward, testing
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

OP = torch.ops.feinwerk.nf4_linear_backward.default


def grad_x(weight: testing.WeightCase, grad_y: torch.Tensor) -> torch.Tensor:
    return nf4_linear_backward(grad_y, weight.packed, weight.absmax, *weight.nested, **weight.sizes)


@functools.lru_cache(maxsize=512)  # the backends follow each other
def given_and_wanted(
    weight: testing.WeightCase, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_y = make_x((rows, weight.N), dtype, seed=rows)
    return grad_y, *linear_budget(grad_y, weight.dense(dtype).t())


def check(weight: testing.WeightCase, rows: int, dtype: torch.dtype) -> None:
    grad_y, truth, budget = given_and_wanted(weight, rows, dtype)
    assert_within(grad_x(weight, grad_y), truth, budget, dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values(backend: str, dtype: torch.dtype, double_quant: bool) -> None:
    for (N, K), rows in some(itertools.product(testing.SHAPES, testing.ROWS), 12):
        check(make_weight(N, K, double_quant=double_quant), rows, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(backend: str, blocksize: int) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    for K, rows, dtype in some(itertools.product((96, 577, 4096 + 64), (1, 20), dtypes), 4):
        check(make_weight(21, K, blocksize=blocksize, double_quant=True), rows, dtype)


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradients_of_x_and_bias(backend: str, dtype: torch.dtype, compute: str) -> None:
    weight = make_weight(37, 129, double_quant=True)
    for rows in (0, 1, 5, 20):
        x = make_x((rows, 129), dtype).requires_grad_()
        bias = make_x((37,), torch.float32).requires_grad_()
        grad_y = make_x((rows, 37), dtype, seed=3)
        weight.linear(x, bias, compute=compute).backward(grad_y)
        assert x.grad is not None
        assert bias.grad is not None
        assert_within_budget(x.grad, grad_y, weight.dense(dtype).t())
        assert bias.grad.dtype is torch.float32
        ones = torch.ones(1, rows)
        assert_within_budget(bias.grad.unsqueeze(0), ones, grad_y.float().t())


def test_gradient_of_one_of_them_only(backend: str) -> None:
    weight = make_weight(7, 64)
    x, bias = make_x((3, 64), torch.float32), make_x((7,), torch.float32)
    y = weight.linear(x.requires_grad_(), bias)
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is None
    y = weight.linear(x.detach(), bias.requires_grad_())
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((7,), 3.0))
    assert not weight.linear(x.detach()).requires_grad


def test_expanded_and_strided_gradients(backend: str) -> None:
    weight = make_weight(10, 65)
    for shape in ((3, 65), (65,), (2, 3, 65), (1, 2, 3, 65)):
        x = make_x(shape, torch.float32).requires_grad_()
        weight.linear(x).sum().backward()  # the gradient arrives with stride 0
        assert x.grad is not None
        expected = grad_x(weight, torch.ones(*shape[:-1], 10))
        assert_same_bits(x.grad, expected)
    strided = make_x((4, 20), torch.float32)[:, ::2]
    assert_same_bits(grad_x(weight, strided), grad_x(weight, strided.contiguous()))


def test_same_bits_for_any_thread_count(backend: str) -> None:
    if backend == "reference":
        return  # its matmul is torch's
    for dtype in testing.DTYPES:
        for rows in (1, 5, 64):
            weight = make_weight(200, 256, double_quant=True)
            grad_y = make_x((rows, 200), dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(grad_x(weight, grad_y))
            for result in results[1:]:
                assert_same_bits(result, results[0])


@given(
    N=st.integers(1, 200),
    K=st.integers(1, 150),
    rows=st.integers(0, 24),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(testing.DTYPES),
    double_quant=st.booleans(),
)
def test_any_sizes(
    backend: str,
    N: int,
    K: int,
    rows: int,
    blocksize: int,
    dtype: torch.dtype,
    double_quant: bool,
) -> None:
    weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant, seed=N + K)
    check(weight, rows, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_full_matrix(backend: str, dtype: torch.dtype, blocksize: int) -> None:
    shapes = ((1, 4097), (127, 129), (257, 1024), (577, 512), (2048, 96))
    numbers = (1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 31, 32, 63, 65, 130)
    for (N, K), double_quant, rows in some(itertools.product(shapes, (False, True), numbers), 8):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        check(weight, rows, dtype)


def test_opcheck(backend: str) -> None:
    for double_quant in (False, True):
        weight = make_weight(6, 96, double_quant=double_quant)
        args = (make_x((2, 3, 6), torch.bfloat16), weight.packed, weight.absmax, *weight.nested)
        torch.library.opcheck(OP, args, weight.sizes)


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 96, double_quant=True)
    bias = make_x((6,), torch.float32)

    def loss(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (weight.linear(torch.tanh(x), b) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        x, b = make_x((4, 96), torch.float32).requires_grad_(), bias.clone().requires_grad_()
        function(x, b).backward()
        grads.append((x.grad, b.grad))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.full
def test_compile_with_inductor(backend: str) -> None:
    torch._dynamo.reset()
    weight = make_weight(6, 96, double_quant=True)
    x = make_x((4, 96), torch.float32).requires_grad_()
    compiled = torch.compile(weight.linear, fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    assert_same_bits(y.detach(), weight.linear(x).detach())
    assert_same_bits(x.grad, grad_x(weight, torch.ones(4, 6)))


def test_activation_checkpointing(backend: str) -> None:
    weight = make_weight(6, 96)
    x = make_x((4, 96), torch.float32).requires_grad_()
    checkpoint(weight.linear, x, use_reentrant=False).sum().backward()
    assert_same_bits(x.grad, grad_x(weight, torch.ones(4, 6)))


def test_saved_tensors_survive_hooks(backend: str) -> None:
    weight = make_weight(6, 96)
    x = make_x((4, 96), torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = weight.linear(x)
    y.sum().backward()
    assert_same_bits(x.grad, grad_x(weight, torch.ones(4, 6)))


def test_no_second_derivative() -> None:
    weight = make_weight(6, 96)
    x = make_x((4, 96), torch.float32).requires_grad_()
    y = weight.linear(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
