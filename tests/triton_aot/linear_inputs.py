"""Inputs of nf4_linear and its gradient: every regime of rows."""

from __future__ import annotations

from tests.triton_aot.meta_tensors import BF16, FP16, FP32, REFERENCE, Rows, meta, weight

# N and K above 2^31 elements, with few steps of a kernel's loop: over K forward, N backward.
TALL, WIDE = (2**24 + 1, 129), (129, 2**24 + 1)


def above(N: int, K: int) -> str:
    """Say in a name that the weight has more elements than an int32 counts."""
    return ", above 2^31" if N * K > 2**31 else ""


# M, dtype, nested, everywhere: every regime of rows, at the shape of a large model's layer.
REGIMES = (
    (1, BF16, True, True),
    (1, BF16, False, False),
    (2, BF16, True, True),
    (2, FP16, False, False),
    (3, BF16, True, False),
    (4, BF16, True, False),
    (8, BF16, True, False),
    (16, BF16, True, True),
    (16, BF16, False, False),
    (17, BF16, True, False),
    (32, BF16, True, False),
    (64, BF16, True, True),
    (128, BF16, True, False),
    (256, BF16, True, False),
    (512, BF16, False, False),
    (2048, BF16, True, True),
    (8192, BF16, False, False),
    (1, FP16, True, False),
    (16, FP16, False, False),
    (64, FP16, True, False),
    (2048, FP16, False, False),
    (1, FP32, True, False),
    (16, FP32, False, False),
    (64, FP32, True, False),
    (2048, FP32, False, False),
)


def nf4_linear() -> Rows:
    for M, dtype, nested, everywhere in REGIMES:
        for N, K in ((4096, 4096), (14336, 4096), (4096, 14336)):
            packed, absmax, tables = weight(N * K, 64, nested)
            args = (meta(M, K, dtype=dtype), packed, absmax, None, *tables)
            name = f"{M}x{N}x{K} {dtype} {'nested' if nested else 'plain'}"
            yield name, args, {"N": N, "K": K, "blocksize": 64}, everywhere and N == 4096 == K
    # M, N, K, blocksize, nested, dtype
    table = (
        (1, 31, 97, 64, True, BF16),
        (2, 1000, 11008, 64, True, BF16),
        (1, 2**17 + 1, 16384, 64, True, BF16),
        (1, 4096, 32768, 64, True, BF16),
        (1, 4096, 4096, 32, False, BF16),
        (1, 4096, 4096, 4096, True, BF16),
        (5, 130, 320, 128, True, FP32),
        (33, 31, 97, 64, False, FP16),
        (64, 4096, 4096, 32, False, BF16),
        (64, 4096, 4096, 4096, True, BF16),
        (2048, 48, 576, 64, False, BF16),
        (1, *TALL, 64, True, BF16),
        (64, *TALL, 64, True, BF16),
    )
    for M, N, K, blocksize, nested, dtype in table:
        packed, absmax, tables = weight(N * K, blocksize, nested)
        args = (meta(M, K, dtype=dtype), packed, absmax, meta(N, dtype=dtype), *tables)
        name = f"{M}x{N}x{K} {dtype}, bias, blocks of {blocksize}{above(N, K)}"
        yield name, args, {"N": N, "K": K, "blocksize": blocksize}, False
    for M in (1, 64):
        packed, absmax, tables = weight(4096 * 4096, 64, True)
        args = (meta(M, 4096, dtype=BF16), packed, absmax, None, *tables)
        options = {"N": 4096, "K": 4096, "blocksize": 64, "compute": "int8"}
        yield f"{REFERENCE}{M} rows, int8", args, options, False


def nf4_linear_backward() -> Rows:
    for M, dtype, nested, everywhere in REGIMES:
        for N, K in ((4096, 4096), (14336, 4096)):
            packed, absmax, tables = weight(N * K, 64, nested)
            args = (meta(M, N, dtype=dtype), packed, absmax, *tables)
            name = f"{M}x{N}x{K} {dtype} {'nested' if nested else 'plain'}"
            yield name, args, {"N": N, "K": K, "blocksize": 64}, everywhere and N == 4096
    # M, N, K, blocksize, nested, dtype
    table = (
        (3, 31, 97, 64, True, BF16),
        (33, 31, 97, 64, False, FP32),
        (64, 4096, 4096, 4096, True, BF16),
        (64, 4096, 4096, 32, False, FP16),
        (1, *WIDE, 64, True, BF16),
        (64, *WIDE, 64, True, BF16),
    )
    for M, N, K, blocksize, nested, dtype in table:
        packed, absmax, tables = weight(N * K, blocksize, nested)
        args = (meta(M, N, dtype=dtype), packed, absmax, *tables)
        name = f"{M}x{N}x{K} {dtype}, blocks of {blocksize}{above(N, K)}"
        yield name, args, {"N": N, "K": K, "blocksize": blocksize}, False
