"""The adapter ops in PyTorch: what is saved, checkpointing, seeds, compile and opcheck."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from feinwerk import dora_linear, lora_linear, testing
from feinwerk.testing import assert_same_bits, make_x
from feinwerk.testing.adapters import AdapterCase, make_adapters

OP = torch.ops.feinwerk.lora_linear.default
BACKWARD = torch.ops.feinwerk.lora_linear_backward.default
# Schemas and fakes do not depend on the instruction set.
FIRST_AND_BEST = testing.backend_ids()[:: max(1, len(testing.backend_ids()) - 1)]


@pytest.fixture(params=FIRST_AND_BEST)
def either(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.use_backend(request.param) as name:
        yield name


INDEX = (0, 0, -1, 1, 2, 1, 1)
KINDS = {
    "lora": {"ranks": (5,), "dora": (False,)},
    "dora": {"ranks": (5,), "dora": (True,)},
    "grouped": {"ranks": (5, 3, 8), "dora": (False, True, True), "index": INDEX},
}


def make(kind: str, N: int = 33, K: int = 130, rows: int = 7, **options: Any) -> AdapterCase:
    options = {**KINDS[kind], **options}
    return make_adapters(N, K, rows, **options)


def require_grad(case: AdapterCase) -> dict[str, torch.Tensor]:
    return {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}


def saved_bytes(
    case: AdapterCase, leaves: dict[str, torch.Tensor], **options: Any
) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that are kept for backward and are neither inputs nor y; and y."""
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = case.call(leaves, **options)
    given = [*leaves.values(), *case.tables, y, *options.values(), case.index, case.seed]
    for value in given:
        if isinstance(value, torch.Tensor):
            kept.pop(value.untyped_storage().data_ptr(), None)
    return sum(kept.values()), y


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["nested", "bf16"])
def test_saved_for_backward(
    backend: str, base: str, kind: str, dtype: torch.dtype, dropout_p: float
) -> None:
    N, K, rows, r = 128, 192, 40, 5
    case = make(
        kind, N, K, rows, base=base, dtype=dtype, adapter_dtype=torch.bfloat16, bias=dtype,
        dropout_p=dropout_p,
    )  # fmt: skip
    base_norm = {"base_norm": case.base_norm()} if kind == "dora" else {}
    got, y = saved_bytes(case, require_grad(case), **base_norm)
    # S in fp32, the scaling, and DoRA's norms; no mask, no copy of x, nothing as large as y or W.
    assert got == 4 * rows * r + 4 + (4 * N if kind == "dora" else 0)
    y.backward(case.grad_y)


def test_a_drawn_seed_is_eight_bytes(backend: str) -> None:
    case = make("lora", dropout_p=0.2)
    assert saved_bytes(case, require_grad(case), seed=None)[0] == 4 * 7 * 5 + 4 + 8


def test_saved_for_backward_of_a_group(backend: str) -> None:
    ordered = torch.tensor([-1, 0, 0, 1, 1, 1, 2])
    case = dataclasses.replace(make("grouped", base="nested"), index=ordered)
    got, _ = saved_bytes(case, require_grad(case), base_norm=case.base_norm())
    # S as wide as the largest rank, a norm an adapter, three scalings, three ranges of rows.
    assert got == 4 * 7 * 8 + 3 * 4 * 33 + 3 * 4 + 3 * 2 * 8


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_survive_hooks(backend: str, kind: str, dropout_p: float) -> None:
    case = make(kind, bias=torch.float32, dropout_p=dropout_p)
    leaves = require_grad(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = case.call(leaves)
    y.backward(case.grad_y)
    case.check({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


@pytest.mark.parametrize("kind", KINDS)
def test_manual_seed_fixes_the_mask(backend: str, kind: str) -> None:
    case = make(kind, dropout_p=0.5)
    results = []
    for number in (7, 7, 8):
        torch.manual_seed(number)
        results.append(case.run(seed=None))
    for name, value in results[0].items():
        assert_same_bits(value, results[1][name], name)
    assert not torch.equal(results[0]["y"], results[2]["y"])
    torch.manual_seed(7)
    drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    dataclasses.replace(case, seed=drawn).check(results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drawn_without_need(backend: str, kind: str) -> None:
    for case, options in (
        (make(kind), {"seed": None}),
        (make(kind, dropout_p=0.5), {}),
    ):
        before = torch.get_rng_state()
        case.run(**options)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_reproduces_dropout(backend: str, kind: str) -> None:
    case = make(kind, bias=torch.float32, dropout_p=0.5)
    torch.manual_seed(3)
    want = case.run(seed=None)
    leaves = require_grad(case)
    names = list(leaves)

    def layer(*values: torch.Tensor) -> torch.Tensor:
        y = case.call(dict(zip(names, values, strict=True)), seed=None)
        torch.rand(3)  # the layers that follow draw too
        return y

    torch.manual_seed(3)
    for reentrant in (False, True):
        torch.manual_seed(3)
        y = checkpoint(layer, *leaves.values(), use_reentrant=reentrant)
        torch.rand(5)
        y.backward(case.grad_y)
        assert_same_bits(y.detach(), want["y"], "y")
        for name, leaf in leaves.items():
            assert_same_bits(leaf.grad, want[name], name)
            leaf.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_no_second_derivative(kind: str) -> None:
    case = make(kind)
    leaves = require_grad(case)
    y = case.call(leaves)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def op_arguments(case: AdapterCase) -> tuple[Any, ...]:
    """The registered op's arguments; the rows of an indexed case must be sorted."""
    adapters, segments = case.adapters, None
    if case.index is not None:
        bounds = torch.searchsorted(case.index, torch.arange(len(adapters) + 1))
        segments = torch.stack([bounds[:-1], bounds[1:]], dim=1)
    dora = any(one.magnitude is not None for one in adapters)
    magnitude = [torch.zeros(0) if one.magnitude is None else one.magnitude for one in adapters]
    return (
        case.x, *case.tables, case.bias, [one.A for one in adapters], [one.B for one in adapters],
        torch.tensor([one.s for one in adapters]), segments, magnitude if dora else [],
        case.base_norm() if dora else None, None, case.seed,
    )  # fmt: skip


def some_calls() -> list[AdapterCase]:
    group = make("grouped", base="nested", dtype=torch.bfloat16, dropout_p=0.2)
    return [
        make("lora", base="fp32"),
        make("lora", base="nf4", dropout_p=0.2, bias=torch.float32),
        make("dora", base="bf16", dtype=torch.float16, bias=torch.float16),
        dataclasses.replace(group, index=group.index.sort().values),
    ]


@pytest.mark.parametrize("at", range(4))
def test_opcheck(either: str, at: int) -> None:
    case = some_calls()[at]
    arguments = op_arguments(case)
    torch.library.opcheck(OP, arguments, {"dropout_p": case.dropout_p})
    y, S, norms = OP(*arguments, dropout_p=case.dropout_p)
    norm = norms if arguments[11] else None
    kept = y if arguments[11] and case.dropout_p == 0 else None
    backward = (case.grad_y, case.x, S, kept, *arguments[1:12], norm, case.seed)
    for wants in ([True] * 5, [True, False, False, False, False], [False, True] * 2 + [False]):
        torch.library.opcheck(BACKWARD, backward, {"dropout_p": case.dropout_p, "wants": wants})
        grads = BACKWARD(*backward, dropout_p=case.dropout_p, wants=wants)
        assert grads[0].numel() == (case.x.numel() if wants[0] else 0)
        assert [len(part) for part in grads[1:4]] == [
            len(part) if want else 0
            for part, want in zip(
                (case.adapters, case.adapters, arguments[11]), wants[1:4], strict=True
            )
        ]


@pytest.mark.parametrize("at", range(4))
def test_the_registered_op_compiles(either: str, at: int) -> None:
    torch._dynamo.reset()
    case = some_calls()[at]
    arguments = op_arguments(case)

    def call() -> tuple[torch.Tensor, ...]:
        return OP(*arguments, dropout_p=case.dropout_p)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(), call(), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compile_fullgraph(either: str, kind: str, dropout_p: float) -> None:
    torch._dynamo.reset()
    case = make(kind, base="nested", bias=torch.float32, dropout_p=dropout_p)
    options = {"base_norm": case.base_norm()} if kind == "dora" else {}

    def layer(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(case.call({**leaves, "x": leaves["x"] * 2}, **options))

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = require_grad(case)
        y = function(leaves)
        y.backward(case.grad_y)
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0, msg=name)


def test_compile_with_dynamic_rows_a_drawn_seed_and_a_tensor_scaling(either: str) -> None:
    torch._dynamo.reset()
    one = make("lora", base="nested").adapters[0]
    weight, *tables = make("lora", base="nested").tables
    names = ("absmax", "nested_absmax", "nested_codebook", "nested_offset")
    nf4 = dict(zip(names, tables, strict=True))

    def layer(x: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, weight, one.A, one.B, **nf4, scaling=scaling, dropout_p=0.5)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 5):
        x, scaling = make_x((rows, 130), torch.float32), torch.tensor(rows / 7)
        results = []
        for function in (layer, compiled):
            torch.manual_seed(rows)
            results.append(function(x, scaling))
        assert_same_bits(results[1], results[0])


def test_an_in_place_activation_compiles(either: str) -> None:
    torch._dynamo.reset()
    case = make("dora", base="nested", bias=torch.float32)
    options = {"base_norm": case.base_norm()}
    results = []
    for compiling in (False, True):
        leaves = require_grad(case)

        def layer(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
            return case.call(leaves, **options).relu_()

        function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiling else layer
        y = function(leaves)
        y.backward(case.grad_y)
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    changed = dataclasses.replace(case, grad_y=case.grad_y * (results[0]["y"] > 0))
    for got in results:
        y = got.pop("y")
        assert_same_bits(y, case.run(wants=())["y"].relu())
        changed.check(got)


def test_dora_without_its_norms_compiles(either: str) -> None:
    torch._dynamo.reset()
    for base in ("nested", "fp32"):
        case = make("dora", base=base)
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(case.leaves()), case.call(case.leaves()))


def test_a_group_compiles_around_its_sorting(either: str) -> None:
    torch._dynamo.reset()
    case = make("grouped", base="nested")
    compiled = torch.compile(case.call, backend="aot_eager")
    assert_same_bits(compiled(case.leaves()), case.call(case.leaves()))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compile_with_inductor(either: str, kind: str) -> None:
    torch._dynamo.reset()
    case = make(kind, base="nested", bias=torch.float32)
    options = {"base_norm": case.base_norm()} if kind == "dora" else {}
    compiled = torch.compile(lambda leaves: case.call(leaves, **options), fullgraph=True)
    leaves = require_grad(case)
    y = compiled(leaves)
    y.backward(case.grad_y)
    case.check({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


@pytest.mark.parametrize(("N", "K", "rows"), [(2**17 + 1, 2**14 + 2, 2), (96, 2**12, 2**20 + 1)])
def test_more_than_2_to_the_31_elements_by_shapes(N: int, K: int, rows: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed, absmax = empty(N * K // 2, dtype=torch.uint8), empty(-(-N * K // 64))
    x, A, B, m = empty(rows, K), empty(3, K), empty(N, 3), empty(N)
    for parameter in (A, B, m):
        parameter.requires_grad_()
    y = lora_linear(x, packed, A, B, absmax=absmax)
    assert y.shape == (rows, N)
    y = dora_linear(x, packed, A, B, m, absmax=absmax, base_norm=empty(N))
    y.backward(empty(rows, N))
    for parameter in (A, B, m):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
    assert lora_linear(x, empty(N, K), A, B).shape == (rows, N)
    with pytest.raises(ValueError, match=f"absmax must have {-(-N * K // 64)} elements"):
        lora_linear(x, packed, A, B, absmax=absmax[:-1])
