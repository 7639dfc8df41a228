"""Kernels stay inside their tensors where these hold more than 2^31 elements."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch

from feinwerk import _library

if not _library.interpreting():  # not collected there, unless somebody names this file
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

import triton
import triton.language as tl

from feinwerk import triton_lib
from tests.triton_addresses import Memory, fake_memory
from tests.triton_aot.inputs import Input, inputs
from tests.triton_aot.meta_tensors import meta

# Real tiles, with look-ups that the interpreter can run: they are not PTX on AMD.
GPU = triton_lib.Gpu("hip", "gfx942", 304, 65536)

# Inputs with a tensor of more elements than an int32 counts.
HUGE = [each for each in inputs() if "above 2^31" in each.name]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors(each)]
    return []


def case(each: Input) -> object:
    """Where rows are many, their sums are long."""
    long = each.op.startswith("lora") and re.match("rows|many", each.name)
    marks = [pytest.mark.full] if long else []
    return pytest.param(each, id=f"{each.op}-{each.name}", marks=marks)


@pytest.mark.parametrize("each", map(case, HUGE))
def test_every_address_is_inside_its_tensor(each: Input) -> None:
    function = getattr(importlib.import_module(_library.OPS[each.op].triton), each.op)
    given = tensors(each.args)
    with fake_memory() as memory:
        if each.op == "nf4_embedding":
            memory.fill(each.args[0], each.kwargs["N"] - 1)  # its last row
        triton_lib.pretend(GPU)
        result = function(*each.args, **each.kwargs)
    assert result is not NotImplemented
    assert memory.launches > 0
    # A product may be torch's own; two codes of a weight are a byte.
    huge = [tensor for tensor in given + tensors(result) if tensor.numel() >= 2**30]
    met = [tensor for tensor in huge if memory.has_met(tensor)]
    assert met
    assert all(memory.reaches_the_end(tensor) for tensor in met)


def test_every_op_is_there() -> None:
    assert {each.op for each in HUGE} == set(_library.OPS)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    i = first * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < count, other=0), mask=i < count)


@triton.jit
def _unmasked_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


COUNT = 2**31 + 1000


def copy(memory: Memory, wide: bool) -> torch.Tensor:
    x, y = (meta(COUNT, dtype=torch.uint8) for _ in range(2))
    triton_lib.launch(_copy_kernel, (triton.cdiv(COUNT, 1024),), x, y, COUNT, 1024, wide)
    return y


def test_offsets_in_int64_pass() -> None:
    with fake_memory() as memory:
        assert memory.reaches_the_end(copy(memory, True))


def test_offsets_in_int32_are_found() -> None:
    with fake_memory() as memory, pytest.raises(Exception, match=r"overflow|outside"):
        copy(memory, False)


def test_a_missing_mask_is_found() -> None:
    x, y = (meta(COUNT, dtype=torch.uint8) for _ in range(2))
    with fake_memory(), pytest.raises(AssertionError, match="_unmasked_kernel loads outside of"):
        triton_lib.launch(_unmasked_kernel, (triton.cdiv(COUNT, 1024),), x, y, 1024)
