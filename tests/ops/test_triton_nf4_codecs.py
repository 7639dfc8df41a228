"""What the NF4 kernels are made of: tiles of a weight, byte planes in PTX, a quantizer's bins."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from feinwerk import _library, testing
from feinwerk.codebook import NF4_THRESHOLDS, NF4_VALUES, RULES
from feinwerk.ops.nf4_dequantize.triton import Choice, dequantize_tile
from feinwerk.ops.nf4_dequantize.triton_planes import assembly
from feinwerk.ops.nf4_quantize.triton import bins
from feinwerk.testing import assert_same_bits, make_weight

if not _library.interpreting():  # not collected there, unless somebody names this file
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

# (row, column, rows, columns) as functions of N and K: whole, rows, whole blocks, groups, unaligned
TILES = (
    lambda N, K: (0, 0, N, K),
    lambda N, K: (1, 0, N - 1, K),
    lambda N, K: (N // 2, 32, 2, 32),
    lambda N, K: (0, 8, N, K - 8),
    lambda N, K: (1, 1, N - 2, K - 3),
)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_tile_is_a_part_of_the_weight(dtype: torch.dtype, double_quant: bool) -> None:
    for N, K, blocksize in ((9, 96, 64), (40, 1024, 32), (33, 250, 32), (5, 4097, 4096)):
        weight = make_weight(N, K, blocksize=blocksize, double_quant=double_quant)
        dense = weight.dense(dtype)
        for tile in TILES:
            row, column, rows, columns = tile(N, K)
            for choice in (None, Choice("select", 256, 4)):
                out = torch.full((rows, columns), torch.nan, dtype=dtype)
                dequantize_tile(
                    out, weight.packed, weight.absmax, *weight.nested,
                    K=K, row=row, column=column, blocksize=blocksize, choice=choice,
                )  # fmt: skip
                want = dense[row : row + rows, column : column + columns].contiguous()
                assert_same_bits(out, want, f"{N}x{K} {row} {column} {rows} {columns}")


def permute(low: int, high: int, selector: int) -> int:
    """PTX's prmt.b32 in its default mode."""
    pool = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    picked = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permute,
}


def test_planes_are_the_codebook() -> None:
    # The interpreter knows no PTX: its five instructions are carried out here.
    program = re.findall(r"^(\w+\.\w+) ([\w$]+), (.*);$", assembly(), re.M)
    assert len(program) == assembly().count(";") - 1  # all but the declaration
    values = np.array(NF4_VALUES, dtype=np.float32).view(np.uint32)
    others = np.random.default_rng(0).integers(0, 256, (256, 3))
    for byte in range(256):
        four = [byte, *others[byte].tolist()]
        registers = {"$8": int.from_bytes(bytes(four), "little")}
        for name, target, text in program:
            words = text.split(", ")
            operands = [registers[w] if w in registers else int(w, 0) for w in words]
            registers[target] = OPERATIONS[name](*operands)
        got = [registers[f"${i}"] for i in range(8)]
        want = [values[b >> 4] for b in four] + [values[b & 15] for b in four]
        assert got == want


@pytest.mark.parametrize("rule", RULES)
def test_bins_count_the_thresholds_below(rule: str) -> None:
    thresholds = np.array(NF4_THRESHOLDS[rule], dtype=np.float32)
    near = [thresholds, np.linspace(-1, 1, 100_001, dtype=np.float32)]
    edges = (np.arange(-16, 17) / np.float32(16)).astype(np.float32)
    for middle in (thresholds, edges, edges[:-1] + np.float32(1 / 32)):
        for direction in (-2, 2):
            step = middle
            for _ in range(3):
                step = np.nextafter(step, np.float32(direction))
                near.append(step)
    value = np.concatenate(near)
    value = value[np.abs(value) <= np.nextafter(np.float32(1), np.float32(2))]
    number = (value * np.float32(16) + np.float32(2**23 + 17)).view(np.int32) & 63
    entry = bins(rule)[number]
    limit = (entry >> 32).astype(np.int32).view(np.float32)
    code = (entry & 0xFFFFFFFF) + (value > limit)
    assert np.array_equal(code, np.searchsorted(thresholds, value))
    nan = 15 if rule == "cpu" else 0
    assert {int(bins(rule)[i]) & 0xFFFFFFFF for i in (0, 63)} == {nan}
