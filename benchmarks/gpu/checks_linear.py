"""Checks of nf4_linear and its gradient: every size of M, odd shapes, strides, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.gpu.checks_weights import short
from benchmarks.gpu.correctness import Check, Results, moved, on_host
from feinwerk import nf4_linear_backward
from feinwerk.testing import DTYPES, WeightCase, assert_within_budget, make_weight, make_x

# None, the vector kernel's, few, the decode kernel's edge, more than a tile, several slabs.
ROWS = (0, 1, 2, 3, 16, 17, 64, 129, 300)
TINY_ROWS = (0, 1, 17)
# (N, K, blocksize): an odd K with blocks that cross rows, whole tiles, odd everything, large ones.
SHAPES = ((130, 321, 64), (384, 1024, 64), (31, 97, 32), (64, 4096, 4096), (1000, 576, 128))
TINY = ((5, 33, 64), (8, 64, 64))


def on(case: WeightCase, device: torch.device) -> WeightCase:
    """The weight on a device."""
    return dataclasses.replace(
        case, packed=case.packed.to(device), absmax=case.absmax.to(device),
        nested=tuple(moved(case.nested, device)),
    )  # fmt: skip


def linear(tiny: bool) -> list[Check]:
    """Every check of the forward."""
    found = list(_forwards(tiny))
    case = make_weight(*(6, 64) if tiny else (200, 512), double_quant=True, seed=9)
    rows = 5 if tiny else 40
    for dtype in DTYPES:
        wide = make_x((rows, 2 * case.K), dtype, seed=4)
        tall = make_x((case.K, rows), dtype, seed=5)
        found.append(_strided(case, wide, "every other column", dtype))
        found.append(_strided(case, tall, "transposed", dtype))
        found.append(_cube(case, make_x((2, 3, case.K), dtype, seed=6)))
    found.append(_int8(case, make_x((rows, case.K), torch.bfloat16, seed=8)))
    return found


def _forwards(tiny: bool) -> Iterator[Check]:
    for i, (N, K, blocksize) in enumerate(TINY if tiny else SHAPES):
        for j, dtype in enumerate(DTYPES):
            # Every kernel of another kind has to be compiled: pairs take turns over the shapes.
            nested = (i + j) % 2 == 0
            case = make_weight(N, K, blocksize=blocksize, double_quant=nested, seed=i)
            bias = (None, make_x((N,), DTYPES[(i + j) % 3], seed=7))[(i // 2 + j) % 2]
            yield _forward(case, dtype, bias, nested, TINY_ROWS if tiny else ROWS)


def _forward(
    case: WeightCase, dtype: torch.dtype, bias: torch.Tensor | None, nested: bool,
    rows: tuple[int, ...],
) -> Check:  # fmt: skip
    inputs = {f"M={M}": make_x((M, case.K), dtype, seed=M) for M in rows}

    def actual(device: torch.device) -> Results:
        weight, given = on(case, device), moved(bias, device)
        return {name: weight.linear(x.to(device), given) for name, x in inputs.items()}

    def judge(results: Results) -> None:
        for name, y in on_host(results).items():
            try:
                assert_within_budget(y, inputs[name], case.dense(dtype), bias)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    what = f"{case.N}x{case.K} {short(dtype)}{' nested' if nested else ''} blocks of"
    name = f"{what} {case.blocksize}{'' if bias is None else ', bias ' + short(bias.dtype)}"
    return Check("nf4_linear", name, actual, judge)


def _strided(case: WeightCase, x: torch.Tensor, what: str, dtype: torch.dtype) -> Check:
    def view(x: torch.Tensor) -> torch.Tensor:
        return x.t() if what == "transposed" else x[:, ::2]

    def actual(device: torch.device) -> Results:
        return {"y": on(case, device).linear(view(x.to(device)))}

    def judge(results: Results) -> None:
        assert_within_budget(on_host(results)["y"], view(x), case.dense(dtype))

    return Check("nf4_linear", f"strided x, {what}, {short(dtype)}", actual, judge)


def _cube(case: WeightCase, x: torch.Tensor) -> Check:
    def actual(device: torch.device) -> Results:
        return {"y": on(case, device).linear(x.to(device))}

    def judge(results: Results) -> None:
        assert_within_budget(on_host(results)["y"], x, case.dense(x.dtype))

    return Check("nf4_linear", f"3-D x, {short(x.dtype)}", actual, judge)


def _int8(case: WeightCase, x: torch.Tensor) -> Check:
    def actual(device: torch.device) -> Results:
        return {"y": on(case, device).linear(x.to(device), compute="int8")}

    def judge(results: Results) -> None:
        y = on_host(results)["y"]
        assert_within_budget(y, x, case.dense(x.dtype), scales=case.scales())

    return Check("nf4_linear", 'compute="int8"', actual, judge)


def backward(tiny: bool) -> list[Check]:
    """Every check of the gradient."""
    found = []
    for i, (N, K, blocksize) in enumerate(TINY if tiny else SHAPES):
        for j, dtype in enumerate(DTYPES):
            nested = (i + j) % 2 == 0
            case = make_weight(N, K, blocksize=blocksize, double_quant=nested, seed=i)
            found.append(_backward(case, dtype, nested, TINY_ROWS if tiny else ROWS))
    case = make_weight(*(6, 64) if tiny else (200, 512), double_quant=True, seed=9)
    found += [_autograd(case, dtype, 5 if tiny else 40) for dtype in DTYPES]
    return found


def _backward(case: WeightCase, dtype: torch.dtype, nested: bool, rows: tuple[int, ...]) -> Check:
    inputs = {f"M={M}": make_x((M, case.N), dtype, seed=M) for M in rows}

    def actual(device: torch.device) -> Results:
        weight = on(case, device)
        return {
            name: nf4_linear_backward(dy.to(device), *weight.tables, **weight.sizes)
            for name, dy in inputs.items()
        }

    def judge(results: Results) -> None:
        for name, dx in on_host(results).items():
            try:
                assert_within_budget(dx, inputs[name], case.dense(dtype).t())
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    what = f"{case.N}x{case.K} {short(dtype)}{' nested' if nested else ''}"
    return Check("nf4_linear_backward", f"{what} blocks of {case.blocksize}", actual, judge)


def _autograd(case: WeightCase, dtype: torch.dtype, rows: int) -> Check:
    """y.sum() sends back a gradient of stride zero."""
    x, bias = make_x((rows, case.K), dtype, seed=2), make_x((case.N,), torch.float32, seed=3)

    def actual(device: torch.device) -> Results:
        leaf = x.to(device, copy=True).requires_grad_()
        added = bias.to(device, copy=True).requires_grad_()
        on(case, device).linear(leaf, added).sum().backward()
        assert leaf.grad is not None
        assert added.grad is not None
        return {"x": leaf.grad, "bias": added.grad}

    def judge(results: Results) -> None:
        got, ones = on_host(results), torch.ones(rows, case.N, dtype=dtype)
        assert_within_budget(got["x"], ones, case.dense(dtype).t())
        if not torch.equal(got["bias"], torch.full((case.N,), float(rows))):
            raise AssertionError("bias: its gradient is not the number of rows")

    return Check("nf4_linear_backward", f"through autograd, {short(dtype)}", actual, judge)
