"""Checks of the exact ops on weights: quantize, dequantize, embedding, the 8-bit pair."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.correctness import Check, compared
from feinwerk import (
    blockwise_dequantize,
    blockwise_quantize,
    nf4_dequantize,
    nf4_embedding,
    nf4_quantize,
)
from feinwerk.codebook import dynamic_map
from feinwerk.testing import DTYPES, make_weight

# (N, K): one element, odd, prime, blocks that cross rows, whole tiles and a little more.
SHAPES = ((1, 1), (3, 17), (31, 97), (130, 321), (64, 512), (257, 1024))
TINY = ((1, 1), (3, 17))
BLOCKSIZES = (32, 64, 4096)


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its package."""
    return str(dtype).removeprefix("torch.")


def quantize(tiny: bool) -> list[Check]:
    """Checks of what makes codes."""
    return [*_quantize(tiny), *_blockwise(tiny)]


def dequantize(tiny: bool) -> list[Check]:
    """Checks of what reads them."""
    return [*_dequantize(tiny), *_embedding(tiny)]


def special(count: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    """Normal numbers among blocks of zeros, denormals, ties and a single large one."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    x[: count // 8] = 0.0
    x[count // 8 : count // 4] *= 1e-39 if dtype is not torch.float16 else 1e-7
    x[count // 4 : count // 3] = x[count // 4 : count // 3].round()
    if count > 3:
        x[-2] = 1e4
    return x.to(dtype)


def _quantize(tiny: bool) -> Iterator[Check]:
    for N, K in TINY if tiny else SHAPES:
        for i, dtype in enumerate(DTYPES):
            for rule in ("cpu", "cuda"):
                blocksize = BLOCKSIZES[(i + N) % len(BLOCKSIZES)]
                yield compared(
                    "nf4_quantize", f"{N}x{K} {short(dtype)} rule {rule} blocks of {blocksize}",
                    nf4_quantize, special(N * K, dtype).view(N, K), blocksize=blocksize, rule=rule,
                    outputs=("packed", "absmax"),
                )  # fmt: skip
    broken = special(1000 if not tiny else 70, torch.float32)
    broken[5], broken[64], broken[-1] = torch.nan, torch.inf, -torch.inf
    for rule in ("cpu", "cuda"):
        yield compared(
            "nf4_quantize", f"NaN and infinity, rule {rule}", nf4_quantize, broken,
            rule=rule, allow_non_finite=True, outputs=("packed", "absmax"),
        )  # fmt: skip
    strided = special(64 * 34, torch.bfloat16).view(64, 34)
    yield compared(
        "nf4_quantize", "a transposed weight", lambda w, **o: nf4_quantize(w.t(), **o), strided,
        outputs=("packed", "absmax"),
    )  # fmt: skip


def _dequantize(tiny: bool) -> Iterator[Check]:
    for i, (N, K) in enumerate(TINY if tiny else SHAPES):
        for nested in (False, True):
            blocksize = BLOCKSIZES[i % len(BLOCKSIZES)]
            case = make_weight(N, K, blocksize=blocksize, double_quant=nested, seed=i)
            for dtype in DTYPES:
                yield compared(
                    "nf4_dequantize",
                    f"{N}x{K} {short(dtype)}{' nested' if nested else ''} blocks of {blocksize}",
                    nf4_dequantize, *case.tables, shape=(N, K), blocksize=blocksize, dtype=dtype,
                )  # fmt: skip


def _embedding(tiny: bool) -> Iterator[Check]:
    for i, (N, K) in enumerate(TINY if tiny else SHAPES):
        generator = torch.Generator().manual_seed(i)
        for nested in (False, True):
            case = make_weight(N, K, double_quant=nested, seed=i)
            dtype = DTYPES[(i + nested) % 3]
            rows = torch.randint(0, N, (3, 5), generator=generator)
            rows[0, 0], rows[-1, -1] = N - 1, 0
            for kind in (torch.int64, torch.int32):
                yield compared(
                    "nf4_embedding",
                    f"{N}x{K} {short(dtype)}{' nested' if nested else ''} {short(kind)}",
                    nf4_embedding, rows.to(kind), *case.tables, N=N, K=K, dtype=dtype,
                )  # fmt: skip
    case = make_weight(5, 64)
    yield compared(
        "nf4_embedding", "no rows", nf4_embedding, torch.empty(0, dtype=torch.int64), *case.tables,
        N=5, K=64,
    )  # fmt: skip


def _blockwise(tiny: bool) -> Iterator[Check]:
    signed, unsigned = dynamic_map(), dynamic_map(False)
    names = ("codes", "absmax", "offset")
    for count in (1, 70) if tiny else (1, 255, 1000, 70001):
        x = special(count, torch.float32, seed=count)
        for rule in ("cpu", "cuda"):
            for center in (False, True):
                yield compared(
                    "blockwise_quantize", f"{count} elements, rule {rule}, center {center}",
                    blockwise_quantize, x, signed, rule=rule, center=center, outputs=names,
                )  # fmt: skip
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8)
        absmax = special(-(-count // 256), torch.float32)
        for offset in (None, torch.tensor(0.37)):
            yield compared(
                "blockwise_dequantize", f"{count} elements{'' if offset is None else ', offset'}",
                blockwise_dequantize, codes, absmax, signed, offset,
            )  # fmt: skip
    for shape, size in (
        (((3, 50), 16), ((1, 17), 64)) if tiny else (((7, 1000), 256), ((33, 97), 64))
    ):
        x = special(shape[0] * shape[1], torch.float32).view(shape).abs()
        yield compared(
            "blockwise_quantize", f"rows of {shape[1]}, blocks of {size}", blockwise_quantize, x,
            unsigned, blocksize=size, rule="cuda", layout="rows", outputs=names,
        )  # fmt: skip
        blocks = -(-shape[1] // size)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        yield compared(
            "blockwise_dequantize", f"rows of {shape[1]}, blocks of {size}", blockwise_dequantize,
            codes, torch.rand(shape[0], blocks), unsigned, blocksize=size, layout="rows",
        )  # fmt: skip
