"""Kernels with one fault each, which the gate must find."""

import triton
import triton.language as tl


@triton.jit
def sound_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def spilling_kernel(x_ptr, N: tl.constexpr):
    # All of the values are alive until the sum is known: more than the registers hold.
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    total = tl.sum(x, axis=0)
    tl.store(x_ptr + i, x * total)


@triton.jit
def product_kernel(x_ptr, y_ptr, K, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    # Loaded ahead in `num_stages` copies, each of them in shared memory.
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K):
        a = tl.load(x_ptr + k.to(tl.int64) * SIZE * SIZE + at)
        b = tl.load(y_ptr + k.to(tl.int64) * SIZE * SIZE + at)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(x_ptr + at, total.to(x_ptr.dtype.element_ty))


@triton.jit
def broken_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.arange(0, N + 1))


@triton.jit
def early_kernel(x_ptr, N: tl.constexpr, WAIT: tl.constexpr):
    # Launched beside the kernel before it; without the wait it may read what that has yet to write.
    i = tl.arange(0, N)
    if WAIT == "first":
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    x = tl.load(x_ptr + i)
    if WAIT == "late":
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.store(x_ptr + i, x + 1)


@triton.jit
def table_kernel(x_ptr, N: tl.constexpr):
    # 32 KiB of static shared memory, of which the compiler's metadata know nothing.
    i = tl.arange(0, N)
    table = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b32 table[8192]; mov.u32 $0, table; }", "=r", [], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr + i, table.to(tl.float32))
