"""Checks at real sizes: more than 2^31 elements, the shapes that are timed, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.checks_adapters import case_on, within_bounds
from benchmarks.gpu.correctness import Check, Results
from benchmarks.gpu.weights import make_weight
from feinwerk import NF4Weight, nf4_dequantize, nf4_embedding, nf4_linear_backward, nn, testing
from feinwerk.testing.adapters import AdapterCase, make_adapters


def large(tiny: bool) -> list[Check]:
    """Every check of this group."""
    return [*_compiled(tiny), *_timed_shapes(tiny), *_huge(tiny)]


class _Once:
    """A value made at its first use, so that a list of checks costs nothing."""

    def __init__(self, make: Callable[[torch.device], NF4Weight]) -> None:
        self._make, self._made = make, None

    def on(self, device: torch.device) -> NF4Weight:
        """The value."""
        if self._made is None or self._made.device.type != device.type:
            self._made = self._make(device)
        return self._made


def within(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Judge some rows of a large product in fp64, where the tensors live.

    Args:
        y: the result, [M, N].
        x: [M, K].
        weight: W~ [N, K] in x's dtype.
    """
    M = x.shape[0]
    rows = torch.arange(M, device=x.device)
    if M > 96:
        rows = torch.cat((rows[:32], rows[M // 2 : M // 2 + 32], rows[-32:]))
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        testing.assert_within_budget(y[rows], x[rows], weight)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def _rows(device: torch.device, M: int, K: int) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(device, torch.bfloat16)


def _timed_shapes(tiny: bool) -> Iterator[Check]:
    """bf16 as it is timed, every branch by M; W~ by the reference."""
    for N, K in ((24, 64),) if tiny else ((14336, 4096), (8192, 8192), (4096, 4096)):
        weight = _Once(lambda device, N=N, K=K: make_weight(device, N, K))
        for M in (1, 5) if tiny else (1, 2, 4, 16, 64, 128, 256, 2048):
            yield _product(weight, N, K, M)
        for M in (5,) if tiny else (1, 16, 128, 2048):
            yield _gradient(weight, N, K, M)
    if not tiny:  # slabs of columns whose tiles are narrow
        wide = _Once(lambda device: make_weight(device, 4096, 14336))
        yield _product(wide, 4096, 14336, 2048)
        yield _gradient(wide, 4096, 14336, 2048)


def dense_of(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """W~ by the reference, on the weight's own device."""
    with testing.use_backend("reference"):
        return weight.dequantize(dtype)


def _product(weight: _Once, N: int, K: int, M: int) -> Check:
    def actual(device: torch.device) -> Results:
        return {"y": weight.on(device).linear(_rows(device, M, K))}

    def judge(results: Results) -> None:
        y = results["y"]
        within(y, _rows(y.device, M, K), dense_of(weight.on(y.device), torch.bfloat16))

    return Check("nf4_linear", f"{N}x{K} M={M} bfloat16, some rows", actual, judge)


def _gradient(weight: _Once, N: int, K: int, M: int) -> Check:
    def actual(device: torch.device) -> Results:
        made = weight.on(device)
        nested = (made.nested_absmax, made.nested_codebook, made.nested_offset)
        dx = nf4_linear_backward(
            _rows(device, M, N), made.packed, made.absmax, *nested, N=N, K=K,
            blocksize=made.blocksize,
        )  # fmt: skip
        return {"dX": dx}

    def judge(results: Results) -> None:
        dx = results["dX"]
        dense = dense_of(weight.on(dx.device), torch.bfloat16)
        within(dx, _rows(dx.device, M, N), dense.t())

    return Check("nf4_linear_backward", f"{N}x{K} M={M} bfloat16, some rows", actual, judge)


def _compiled(tiny: bool) -> Iterator[Check]:
    """An NF4Linear with LoRA and with DoRA under torch.compile(fullgraph=True), all gradients."""
    N, K, M = (8, 64, 3) if tiny else (512, 1024, 40)
    for dora in (False, True):
        case = make_adapters(
            N, K, M, (16,), dtype=torch.bfloat16, base="nested", dora=(dora,), bias=torch.float32
        )

        def actual(device: torch.device, case: AdapterCase = case) -> Results:
            there = case_on(case, device)
            layer = layer_of(there).train()
            backend = "aot_eager" if device.type == "cpu" else "inductor"
            x = there.x.clone().requires_grad_()
            y = torch.compile(layer, fullgraph=True, backend=backend)(x)
            y.backward(there.grad_y)
            found = {"y": y.detach(), "x": x.grad}
            found |= {"A0": layer.lora_A.grad, "B0": layer.lora_B.grad}
            if case.adapters[0].magnitude is not None:
                found["magnitude0"] = layer.magnitude.grad
            return {name: value for name, value in found.items() if value is not None}

        def judge(results: Results, case: AdapterCase = case) -> None:
            names = {"y", *case.leaves()} - {"bias"}
            if results.keys() != names:
                raise AssertionError(f"results: expected {sorted(names)}, got {sorted(results)}")
            within_bounds(case, results)

        name = f"{'DoRA' if dora else 'LoRA'} on NF4Linear, torch.compile(fullgraph=True)"
        yield Check("lora_linear", name, actual, judge, poison=False)


def layer_of(case: AdapterCase) -> Any:
    """The module that computes a call: LoRALinear or DoRALinear over an NF4Linear."""
    base, (one,) = case.base, case.adapters
    assert isinstance(base, testing.WeightCase)
    weight = NF4Weight(
        base.packed, base.absmax, (case.N, case.K), base.blocksize, case.x.dtype, *base.nested
    )
    r = one.A.shape[0]
    kind = nn.LoRALinear if one.magnitude is None else nn.DoRALinear
    layer = kind(nn.NF4Linear.from_weight(weight, case.bias), r, lora_alpha=r * one.s)
    with torch.no_grad():
        layer.lora_A.copy_(one.A)
        layer.lora_B.copy_(one.B)
        if one.magnitude is not None:
            layer.magnitude.copy_(one.magnitude)
    return layer


def _huge(tiny: bool) -> Iterator[Check]:
    """A weight of more than 2^31 elements, zero but for its last rows: int64 offsets throughout."""
    rows, K = (6, 65) if tiny else (2**16, 2**15 + 1)
    last = 2
    start = (rows - last) * K
    aligned = start // 64 * 64
    for nested in (False, True):
        small = testing.make_weight(
            1, last * K + start - aligned, double_quant=nested, seed=5
        )  # fmt: skip

        def tables(
            device: torch.device, small: testing.WeightCase = small, nested: bool = nested
        ) -> tuple[torch.Tensor | None, ...]:
            count = rows * K
            packed = torch.full(((count + 1) // 2,), 0x77, dtype=torch.uint8, device=device)
            packed[aligned // 2 :] = small.packed.to(device)
            absmax = torch.zeros(-(-count // 64), dtype=small.absmax.dtype, device=device)
            absmax[aligned // 64 :] = small.absmax.to(device)
            if not nested:
                return (packed, absmax, None, None, None)
            scales, codebook, offset = small.nested
            assert scales is not None
            assert codebook is not None
            assert offset is not None
            # Blocks of 256 scales begin elsewhere than in the small weight: give all one scale.
            one = torch.full((-(-len(absmax) // 256),), float(scales[0]), device=device)
            return (packed, absmax, one, codebook.to(device), offset.to(device))

        def expected(device: torch.device, small: testing.WeightCase = small) -> torch.Tensor:
            nested_tables = small.nested
            if nested_tables[0] is not None:
                same = torch.full_like(nested_tables[0], float(nested_tables[0][0]))
                nested_tables = (same, *nested_tables[1:])
            with testing.use_backend("reference"):
                dense = nf4_dequantize(
                    small.packed, small.absmax, *nested_tables, shape=(small.K,),
                    dtype=torch.bfloat16,
                )  # fmt: skip
            return dense[start - aligned :].view(last, K).to(device)

        what = f"{rows * K:,} elements{', nested' if nested else ''}"
        yield _last_rows("nf4_dequantize", what, tables, expected, rows, K, last)
        yield _last_rows("nf4_embedding", what, tables, expected, rows, K, last)
        yield _last_rows("nf4_linear", what, tables, expected, rows, K, last)


def _last_rows(
    op: str,
    what: str,
    tables: Callable[[torch.device], tuple[torch.Tensor | None, ...]],
    expected: Callable[[torch.device], torch.Tensor],
    rows: int,
    K: int,
    last: int,
) -> Check:
    x = testing.make_x((1, K), torch.bfloat16, seed=6)

    def actual(device: torch.device) -> Results:
        given = tables(device)
        assert given[0] is not None
        assert given[1] is not None
        if op == "nf4_dequantize":
            out = nf4_dequantize(*given, shape=(rows, K), dtype=torch.bfloat16)  # type: ignore[arg-type]
            return {"last": out[-last:].clone()}
        if op == "nf4_embedding":
            index = torch.tensor([rows - 2, rows - 1], device=device)
            return {"last": nf4_embedding(index, *given, N=rows, K=K, dtype=torch.bfloat16)}  # type: ignore[arg-type]
        weight = NF4Weight(given[0], given[1], (rows, K), 64, torch.bfloat16, *given[2:])
        return {"last": weight.linear(x.to(device))[:, -last:].clone()}

    def judge(results: Results) -> None:
        want = expected(torch.device("cpu"))
        got = results["last"].cpu()
        if op == "nf4_linear":
            testing.assert_within_budget(got, x, want)
            return
        testing.assert_same_bits(got, want, "the last rows")

    return Check(op, what, actual, judge, twice=op != "nf4_linear")
