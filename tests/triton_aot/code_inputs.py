"""Inputs of the ops that make codes of values and values of codes."""

from __future__ import annotations

import torch

from tests.triton_aot.meta_tensors import BF16, FP16, FP32, Rows, meta, weight


def nf4_dequantize() -> Rows:
    # name, N, K, blocksize, nested, dtype, everywhere
    table = (
        ("bf16", 4096, 4096, 64, False, BF16, True),
        ("bf16 nested", 4096, 4096, 64, True, BF16, True),
        ("fp16", 4096, 4096, 64, False, FP16, False),
        ("fp32 nested", 4096, 4096, 64, True, FP32, False),
        ("blocks of 32", 4096, 4096, 32, True, BF16, False),
        ("blocks of 4096", 4096, 4096, 4096, False, BF16, False),
        ("odd", 31, 97, 64, True, FP32, False),
        ("above 2^31", 2**16, 2**15 + 1, 64, True, BF16, False),
    )
    for name, N, K, blocksize, nested, dtype, everywhere in table:
        packed, absmax, tables = weight(N * K, blocksize, nested)
        options = {"shape": (N, K), "blocksize": blocksize, "dtype": dtype}
        yield name, (packed, absmax, *tables), options, everywhere


def nf4_quantize() -> Rows:
    # name, shape, dtype, blocksize, rule, everywhere
    table = (
        ("bf16", (4096, 4096), BF16, 64, "cuda", True),
        ("bf16 cpu rule", (4096, 4096), BF16, 64, "cpu", True),
        ("fp16", (4096, 4096), FP16, 64, "cpu", False),
        ("fp32", (4096, 4096), FP32, 64, "cpu", False),
        ("fp32 cuda rule", (4096, 4096), FP32, 128, "cuda", False),
        ("blocks of 32", (4096, 4096), BF16, 32, "cpu", False),
        ("blocks of 4096", (4096, 4096), BF16, 4096, "cpu", False),
        ("odd", (31, 97), FP32, 64, "cpu", False),
        ("above 2^31", (2**16, 2**15 + 1), BF16, 64, "cpu", False),
    )
    for name, shape, dtype, blocksize, rule, everywhere in table:
        # Without the permission a launcher has to read values, which META tensors have not.
        options = {"blocksize": blocksize, "rule": rule, "allow_non_finite": True}
        yield name, (meta(*shape, dtype=dtype),), options, everywhere


def nf4_embedding() -> Rows:
    # name, rows, N, K, nested, dtype, everywhere
    table = (
        ("bf16", 2048, 128256, 4096, False, BF16, True),
        ("bf16 nested", 2048, 128256, 4096, True, BF16, True),
        ("fp16", 1, 32000, 4096, True, FP16, False),
        ("fp32", 7, 32000, 2048, False, FP32, False),
        ("odd", 7, 31, 97, True, BF16, False),
        ("above 2^31", 7, 2**16, 2**15 + 1, True, BF16, False),
    )
    for name, rows, N, K, nested, dtype, everywhere in table:
        packed, absmax, tables = weight(N * K, 64, nested)
        args = (meta(rows, dtype=torch.int64), packed, absmax, *tables)
        yield name, args, {"N": N, "K": K, "blocksize": 64, "dtype": dtype}, everywhere


def blockwise_quantize() -> Rows:
    # name, shape, blocksize, center, rule, layout, everywhere
    table = (
        ("nested", (262144,), 256, True, "cpu", "flat", True),
        ("plain", (262144,), 256, False, "cpu", "flat", True),
        ("cuda rule", (262144,), 256, False, "cuda", "flat", False),
        ("rows", (4096, 1000), 256, False, "cpu", "rows", False),
        ("blocks of 100", (3001,), 100, True, "cuda", "flat", False),
        ("few", (7,), 256, True, "cpu", "flat", False),
        ("above 2^31", (2**31 + 1000,), 256, True, "cpu", "flat", False),
        ("rows above 2^31", (2**16, 2**15 + 1), 256, False, "cuda", "rows", False),
    )
    for name, shape, blocksize, center, rule, layout, everywhere in table:
        options = {"blocksize": blocksize, "center": center, "rule": rule, "layout": layout}
        yield name, (meta(*shape), meta(256)), options, everywhere


def blockwise_dequantize() -> Rows:
    # name, shape, blocksize, offset, layout, everywhere
    table = (
        ("nested", (262144,), 256, True, "flat", True),
        ("plain", (262144,), 256, False, "flat", False),
        ("rows", (4096, 1000), 256, False, "rows", False),
        ("blocks of 100", (3001,), 100, True, "flat", False),
        ("above 2^31", (2**31 + 1000,), 256, True, "flat", False),
        ("rows above 2^31", (2**16, 2**15 + 1), 256, False, "rows", False),
    )
    for name, shape, blocksize, offset, layout, everywhere in table:
        rows = shape[0] if layout == "rows" else 1
        blocks = rows * -(-shape[-1] // blocksize)
        codes = meta(*shape, dtype=torch.uint8)
        args = (codes, meta(blocks), meta(256), meta() if offset else None)
        yield name, args, {"blocksize": blocksize, "layout": layout}, everywhere
