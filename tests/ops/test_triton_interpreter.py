"""The mend of bf16 in Triton's interpreter: needed, and equal to what torch computes."""

from __future__ import annotations

import pytest
import torch

from feinwerk import _library

if not _library.interpreting():  # not collected there, unless somebody names this file
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _bf16_kernel(a_ptr, b_ptr, wide_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a * b)
    tl.store(out_ptr + 2 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 3 * N + i, -a)
    tl.store(out_ptr + 4 * N + i, tl.load(wide_ptr + i).to(tl.bfloat16))
    tl.store(out_ptr + 5 * N + i, tl.where(a < b, a, b))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_arithmetic_comparison_and_casts_are_torchs() -> None:
    N = 256
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, generator=generator).bfloat16() for _ in range(2))
    wide = torch.randn(N, generator=generator)
    wide[:4] = torch.tensor([1.00390625, 1.01171875, torch.nan, -torch.inf])  # two ties
    out = torch.empty(6, N, dtype=torch.bfloat16)
    _bf16_kernel[(1,)](a, b, wide, out, N)
    truth = torch.stack(
        [a + b, a * b, torch.maximum(a, b), -a, wide.bfloat16(), torch.minimum(a, b)]
    )
    assert torch.equal(out.nan_to_num(7), truth.nan_to_num(7))


def test_dot_is_the_product_of_the_values() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, 32)
    truth = a.double() @ b.double()
    assert (out - truth).abs().max() <= 32 * 2.0**-23 * (a.double().abs() @ b.double().abs()).max()


def test_the_mend_is_needed() -> None:
    # When this fails, Triton's interpreter has learnt bf16 and the mend can go.
    import subprocess
    import sys

    code = (
        "import torch, triton, triton.language as tl\n"
        "from tests.ops import test_triton_interpreter as t\n"
        "a = torch.full((32, 32), 1.5).bfloat16()\n"
        "out = torch.empty(32, 32)\n"
        "t._dot_kernel[(1,)](a, a, out, 32)\n"
        "print(bool((out == 72).all()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
