"""Checks of the adapter ops: y and every gradient within the budget of docs/numerics.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.checks_linear import on
from benchmarks.gpu.checks_weights import short
from benchmarks.gpu.correctness import Check, Results, moved, on_host
from feinwerk import _library, weight_norm
from feinwerk.testing import DTYPES, WeightCase, assert_within, ulp
from feinwerk.testing.adapter_budget import norm_truth
from feinwerk.testing.adapters import BASES, Adapter, AdapterCase, make_adapters

# (N, K, r): odd, several tiles, more rank than a tile, the usual rank.
SHAPES = ((33, 130, 17), (130, 321, 3), (48, 576, 130), (256, 1024, 16))
TINY = ((5, 33, 3), (8, 64, 16))
ROWS = (0, 1, 3, 17, 129, 300)
TINY_ROWS = (0, 1, 5)


def case_on(case: AdapterCase, device: torch.device) -> AdapterCase:
    """The same call with its tensors on a device."""
    base = case.base
    adapters = tuple(
        Adapter(*(moved(part, device) for part in (a.A, a.B, a.scaling, a.magnitude)))
        for a in case.adapters
    )
    return dataclasses.replace(
        case, x=case.x.to(device), adapters=adapters, grad_y=case.grad_y.to(device),
        base=on(base, device) if isinstance(base, WeightCase) else base.to(device),
        bias=moved(case.bias, device), lora_bias=moved(case.lora_bias, device),
        index=moved(case.index, device), seed=moved(case.seed, device),
    )  # fmt: skip


def within_bounds(case: AdapterCase, results: Results) -> None:
    """Raise AssertionError unless each result is within its budget, Triton's where that made it."""
    got = on_host(results)
    if not _library.interpreting() and not any(value.is_cuda for value in results.values()):
        case.check(got)
        return
    leaves, bounds = case.leaves(), case.bounds(False, triton=True)
    for name, value in got.items():
        dtype = case.x.dtype if name == "y" else leaves[name].dtype
        assert_within(value, *bounds[name], dtype, name)


def checked(op: str, name: str, case: AdapterCase) -> Check:
    """Y and all gradients of one call."""

    def judge(results: Results) -> None:
        if results.keys() != {"y", *case.leaves()}:
            raise AssertionError(f"results: got {sorted(results)}")
        within_bounds(case, results)

    return Check(op, name, lambda device: case_on(case, device).run(), judge)


def lora(tiny: bool) -> list[Check]:
    """LoRA over every base and dtype, with and without dropout, biases, every number of rows."""
    return list(_single("lora_linear", tiny, dora=False))


def dora(tiny: bool) -> list[Check]:
    """DoRA likewise."""
    return list(_single("lora_linear", tiny, dora=True))


def norm(tiny: bool) -> list[Check]:
    """DoRA's norm alone."""
    return list(_norms(tiny))


def _single(op: str, tiny: bool, *, dora: bool) -> Iterator[Check]:
    turn = 0
    for i, (N, K, r) in enumerate(TINY if tiny else SHAPES):
        for rows in TINY_ROWS if tiny else ROWS:
            # Every kernel of another kind has to be compiled: the options take turns.
            turn += 1
            options: dict[str, Any] = {
                "dtype": DTYPES[(turn + i) % 3],
                "base": BASES[(2 * turn + i) % len(BASES)],
                "adapter_dtype": (torch.float32, torch.bfloat16)[turn // 2 % 2],
                "bias": (None, *DTYPES)[turn % 4],
                "lora_bias": None if dora else (None, torch.float32)[turn // 4 % 2],
                "dropout_p": (0.0, 0.0, 0.3)[(turn + 2 * i) % 3],
                "dora": (dora,),
                "seed": turn,
            }
            case = make_adapters(N, K, rows, (r,), **options)
            yield checked(op, _name(N, K, rows, (r,), options), case)
    # As it is trained: bf16 over double quantization, with and without dropout.
    N, K, r, rows = (8, 64, 16, 6) if tiny else (512, 1024, 16, 256)
    for dropout_p in (0.0, 0.1):
        options = {"dtype": torch.bfloat16, "base": "nested", "adapter_dtype": torch.float32}
        options |= {"dropout_p": dropout_p, "dora": (dora,), "seed": 99}
        case = make_adapters(N, K, rows, (r,), **options)
        yield checked(op, _name(N, K, rows, (r,), options), case)


def _name(N: int, K: int, rows: int, ranks: tuple[int, ...], options: dict[str, Any]) -> str:
    kinds = options["dora"]
    method = "DoRA" if all(kinds) else "LoRA and DoRA" if any(kinds) else "LoRA"
    parts = [f"{method} {N}x{K} M={rows} r={','.join(map(str, ranks))}", short(options["dtype"])]
    parts += [f"over {options['base']}", f"adapters {short(options['adapter_dtype'])}"]
    parts += [f"{key} {short(options[key])}" for key in ("bias", "lora_bias") if options.get(key)]
    if options["dropout_p"]:
        parts.append(f"dropout {options['dropout_p']}")
    return ", ".join(parts)


def _norms(tiny: bool) -> Iterator[Check]:
    for i, (N, K, r) in enumerate(TINY if tiny else SHAPES):
        for j, base in enumerate(BASES[i % 2 :: 2]):
            adapter_dtype = (torch.float32, torch.bfloat16)[(i + j) % 2]
            case = make_adapters(N, K, 0, (r,), base=base, adapter_dtype=adapter_dtype)
            yield _norm(case, f"{N}x{K} r={r} over {base}", (None, *DTYPES)[(i + j) % 4])


def _norm(case: AdapterCase, name: str, dtype: torch.dtype | None) -> Check:
    def actual(device: torch.device) -> Results:
        there = case_on(case, device)
        weight, *tables = there.tables
        one = there.adapters[0]
        assert weight is not None
        norm = weight_norm(
            weight, one.A, one.B, *tables, scaling=one.scaling, blocksize=there.blocksize,
            dtype=dtype, base_norm=case.base_norm().to(device),
        )  # fmt: skip
        return {"norm": norm}

    def judge(results: Results) -> None:
        one, W = case.adapters[0], case.dense(dtype)
        truth, error = norm_truth(W, case.base_norm(), one.A, one.B, one.s)
        assert_within(
            on_host(results)["norm"], truth, error + ulp(truth, torch.float32), torch.float32
        )

    return Check("weight_norm", name if dtype is None else f"{name}, {short(dtype)}", actual, judge)


def grouped(tiny: bool) -> list[Check]:
    """Many adapters in one batch: sorted and not, rows without any, ranks that differ."""
    found = []
    generator = torch.Generator().manual_seed(0)
    mixed = tuple(torch.randint(-1, 3, (9 if tiny else 130,), generator=generator).tolist())
    long = (*[0] * 70, *[2] * 200, *[1] * 3)
    indices = (mixed, (-1, -1, -1), (2,), ()) if tiny else (mixed, long, (-1, -1, -1), (2,), ())
    shapes = ((5, 33, (3, 1, 2)),) if tiny else (
        (33, 130, (3, 40, 17)), (130, 321, (16, 1, 3)), (256, 1024, (16, 16, 16))
    )  # fmt: skip
    turn = 0
    for N, K, ranks in shapes:
        for index in indices:
            turn += 1
            options: dict[str, Any] = {
                "dtype": DTYPES[turn % 3],
                "base": BASES[turn % len(BASES)],
                "adapter_dtype": (torch.float32, torch.bfloat16)[turn // 2 % 2],
                "bias": (None, *DTYPES)[turn % 4],
                "dropout_p": (0.0, 0.3)[turn // 2 % 2],
                "dora": ((False,) * 3, (False, True, True), (True,) * 3)[turn // 3 % 3],
                "seed": turn,
            }
            name = "grouped " + _name(N, K, len(index), ranks, options)
            case = make_adapters(N, K, len(index), ranks, index=index, **options)
            found.append(checked("lora_linear", name, case))
    return found
