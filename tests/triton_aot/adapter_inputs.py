"""Inputs of the ops with adapters: LoRA, DoRA, many of them, and the norm."""

from __future__ import annotations

from typing import Any

import torch

from tests.triton_aot.meta_tensors import BF16, FP16, FP32, REFERENCE, Rows, base_of, meta


def weight_norm() -> Rows:
    # name, N, K, r, base: "dense" or blocks and nesting, dtype of W~ and of the adapter, everywhere
    table: tuple[tuple[Any, ...], ...] = (
        ("nf4", 4096, 4096, 16, (64, True), BF16, BF16, True),
        ("plain nf4", 4096, 4096, 8, (64, False), BF16, FP32, False),
        ("fp16, rank 64", 4096, 4096, 64, (128, True), FP16, FP16, False),
        ("dense", 4096, 4096, 16, None, BF16, BF16, False),
        ("fp32", 4096, 4096, 16, (64, True), FP32, FP32, False),
        ("dense fp32", 4096, 4096, 16, None, FP32, FP32, False),
        ("odd", 31, 97, 3, (64, True), BF16, FP32, False),
        ("rank 256", 4096, 4096, 256, (64, True), BF16, BF16, False),
        ("above 2^31", 2**24 + 1, 129, 16, (64, True), BF16, BF16, False),
        ("dense above 2^31", 2**24 + 1, 129, 16, None, BF16, BF16, False),
    )
    for name, N, K, r, base, dtype, adapter, everywhere in table:
        tables = base_of(N, K, base, dtype)
        args = (*tables, meta(r, K, dtype=adapter), meta(N, r, dtype=adapter), meta(), meta(N))
        options = {"blocksize": base[0] if base else 64, "dtype": dtype}
        yield name, args, options, everywhere


# name, M, N, K, ranks, base, dtype of x, of the adapters, dropout_p, DoRA, everywhere
ADAPTED: tuple[tuple[Any, ...], ...] = (
    ("LoRA", 4096, 4096, 4096, (16,), (64, True), BF16, BF16, 0.0, False, True),
    ("LoRA fp32 adapter", 2048, 4096, 4096, (16,), (64, True), BF16, FP32, 0.0, False, False),
    ("LoRA decode", 1, 4096, 4096, (16,), (64, True), BF16, BF16, 0.0, False, True),
    ("LoRA 16 rows", 16, 4096, 4096, (8,), (64, False), BF16, BF16, 0.0, False, False),
    ("LoRA 64 rows", 64, 14336, 4096, (64,), (64, True), BF16, BF16, 0.0, False, False),
    ("LoRA dropout", 4096, 4096, 4096, (16,), (64, True), BF16, BF16, 0.1, False, True),
    ("LoRA rank 128", 4096, 4096, 4096, (128,), (64, True), BF16, BF16, 0.0, False, False),
    ("LoRA rank 3", 33, 31, 97, (3,), (64, True), FP32, FP32, 0.1, False, False),
    ("LoRA rank 256", 512, 4096, 4096, (256,), (64, True), BF16, FP32, 0.1, False, False),
    ("LoRA fp16", 2048, 4096, 4096, (16,), (64, False), FP16, FP16, 0.1, False, False),
    ("LoRA fp16 rank 32", 2048, 4096, 4096, (32,), (64, False), FP16, FP16, 0.1, False, False),
    ("LoRA fp32", 2048, 4096, 4096, (16,), (64, True), FP32, FP32, 0.0, False, False),
    ("LoRA dense", 4096, 4096, 4096, (16,), None, BF16, BF16, 0.0, False, False),
    ("LoRA dense dropout", 4096, 4096, 4096, (16,), None, BF16, FP32, 0.1, False, False),
    ("DoRA", 4096, 4096, 4096, (16,), (64, True), BF16, BF16, 0.0, True, True),
    ("DoRA decode", 1, 4096, 4096, (16,), (64, True), BF16, BF16, 0.0, True, False),
    ("DoRA dropout", 4096, 4096, 4096, (16,), (64, True), BF16, BF16, 0.1, True, False),
    ("DoRA rank 256", 512, 4096, 4096, (256,), (64, True), BF16, BF16, 0.0, True, False),
    ("DoRA fp32", 64, 4096, 4096, (8,), (64, False), FP32, FP32, 0.1, True, False),
    ("DoRA dense", 2048, 4096, 4096, (16,), None, FP16, FP32, 0.0, True, False),
    ("many", 64, 4096, 4096, (8, 16, 64), (64, True), BF16, BF16, 0.0, False, False),
    ("many, dropout", 2048, 4096, 4096, (16, 16), (64, True), BF16, BF16, 0.1, False, False),
    ("many with DoRA", 512, 4096, 4096, (16, 8), (64, True), BF16, FP32, 0.0, True, False),
    ("many, one with DoRA", 512, 4096, 4096, (16, 8), (64, True), BF16, BF16, 0.1, True, False),
    ("many, decode", 8, 4096, 4096, (16,) * 8, (64, True), BF16, BF16, 0.0, False, False),
    # Few steps of a kernel's loop: over K forward, over N backward.
    ("tall above 2^31", 2, 2**24 + 1, 129, (16,), (64, True), BF16, BF16, 0.1, False, False),
    ("wide above 2^31", 2, 129, 2**24 + 1, (16,), (64, True), BF16, BF16, 0.1, False, False),
    ("DoRA tall above 2^31", 64, 2**24 + 1, 129, (16,), (64, True), BF16, BF16, 0.0, True, False),
    ("DoRA wide above 2^31", 64, 129, 2**24 + 1, (16,), (64, True), BF16, BF16, 0.0, True, False),
    ("rows above 2^31", 2**20, 4096, 4096, (16,), (64, True), BF16, BF16, 0.1, False, False),
    ("many above 2^31", 2**20, 4096, 4096, (16, 8), (64, True), BF16, BF16, 0.0, True, False),
    ("many dense", 512, 4096, 4096, (16, 8), None, BF16, BF16, 0.1, True, False),
)


def _segments(M: int, count: int) -> torch.Tensor | None:
    """Rows [begin, end) of every adapter; on the CPU, where launchers read them."""
    if count == 1:
        return None
    edges = [M * i // count for i in range(count + 1)]
    return torch.tensor([edges[i : i + 2] for i in range(count)], dtype=torch.int64)


def _adapters(
    N: int, K: int, ranks: tuple[int, ...], dtype: torch.dtype, dora: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    A = [meta(r, K, dtype=dtype) for r in ranks]
    B = [meta(N, r, dtype=dtype) for r in ranks]
    return A, B, [meta(N, dtype=dtype) for _ in ranks] if dora else []


def lora_linear() -> Rows:
    for name, M, N, K, ranks, base, dtype, adapter, p, dora, everywhere in ADAPTED:
        if "wide" in name:
            continue
        A, B, magnitude = _adapters(N, K, ranks, adapter, dora)
        if "one with DoRA" in name:
            magnitude[1] = meta(0, dtype=adapter)
        norms = [(meta(N), None), (None, meta(len(ranks), N))] if dora else [(None, None)]
        for base_norm, known in norms:
            args = (
                meta(M, K, dtype=dtype),
                *base_of(N, K, base, dtype),
                meta(N, dtype=dtype) if "fp" in name else None,
                A, B, meta(len(ranks)), _segments(M, len(ranks)), magnitude, base_norm, known,
                meta(dtype=torch.int64) if p else None,
            )  # fmt: skip
            options = {"dropout_p": p, "blocksize": base[0] if base else 64}
            yield name + (", norm known" if known is not None else ""), args, options, everywhere
    A, B, _ = _adapters(4096, 4096, (16,), BF16, False)
    args = (
        meta(64, 4096, dtype=BF16), *base_of(4096, 4096, (64, True), BF16), None, A, B, meta(1),
        None, [], None, None, None,
    )  # fmt: skip
    yield f"{REFERENCE}int8", args, {"dropout_p": 0.0, "blocksize": 64, "compute": "int8"}, False


def lora_linear_backward() -> Rows:
    for name, M, N, K, ranks, base, dtype, adapter, p, dora, everywhere in ADAPTED:
        if "tall" in name:
            continue
        A, B, magnitude = _adapters(N, K, ranks, adapter, dora)
        if "one with DoRA" in name:
            magnitude[1] = meta(0, dtype=adapter)
        # The product that y would have kept is summed over K.
        both = (True,) if "wide" in name else (True, False)
        for kept in both if dora and not p else (False,):
            for grad_x in (True, False) if name == "LoRA" else (True,):
                args = (
                    meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), meta(M, max(ranks)),
                    meta(M, N, dtype=dtype) if kept else None,
                    *base_of(N, K, base, dtype),
                    meta(N, dtype=dtype) if "fp" in name else None,
                    A, B, meta(len(ranks)), _segments(M, len(ranks)), magnitude,
                    meta(len(ranks), N) if dora else None,
                    meta(dtype=torch.int64) if p else None,
                )  # fmt: skip
                wants = [grad_x, True, True, dora, "fp" in name]
                options = {"dropout_p": p, "blocksize": base[0] if base else 64, "wants": wants}
                text = f"{name}{', y kept' if kept else ''}{'' if grad_x else ', no grad_x'}"
                yield text, args, options, everywhere
