"""The PTX of nf4_linear's look-ups, instruction by instruction, over all bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from feinwerk.codebook import NF4_VALUES
from feinwerk.ops.nf4_linear import triton_prmt

DTYPES = (torch.bfloat16, torch.float16)
WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX's prmt.b32: bytes of a and b by nibbles, or, with bit 3, eight copies of their sign."""
    pool = (b << 32 | a).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        chosen.append(byte if nibble < 8 else 0xFF * (byte >> 7))
    return int.from_bytes(bytes(chosen), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX's lop3.b32: bit 4 a + 2 b + c of the table, for every bit."""
    bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def half(word: int) -> int:
    """The bits of an fp16 number in fp32: PTX's cvt.f32.f16."""
    value = torch.tensor(word).to(torch.int16).view(torch.float16)
    return int(value.float().view(torch.int32)) & WORD


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "cvt.f32.f16": half,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def run(
    assembly: str, inputs: dict[str, int], memory: dict[int, int] | None = None
) -> dict[str, int]:
    """Execute PTX on some registers, with shared memory by address, and return all registers."""
    registers = dict(inputs)
    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.split()[0] == ".reg":
            continue
        name, operands = line.split(None, 1)
        if name == "mov.b32" and "{" in operands:
            low, high, source = (operand.strip("{} ") for operand in operands.split(","))
            registers[low], registers[high] = registers[source] & 0xFFFF, registers[source] >> 16
            continue
        if name == "ld.shared.b32":
            to, source = (operand.strip("[] ") for operand in operands.split(","))
            assert memory is not None
            registers[to] = memory[registers[source]]
            continue
        to, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[to] = INSTRUCTIONS[name](*values) & WORD
    return registers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_in_every_place(dtype: torch.dtype) -> None:
    expected = triton_prmt.target_bits(dtype)
    assembly = triton_prmt.assembly(dtype)
    for first in range(256):
        # Every place sees all bytes, each time beside others.
        packed = [first, (5 * first + 1) & 255, (77 * first + 130) & 255, 255 - first]
        out = run(assembly, {"$4": int.from_bytes(bytes(packed), "little")})
        words = [out[f"${i}"] for i in range(4)]
        halves = [word >> 16 * half & 0xFFFF for word in words for half in range(2)]
        assert halves[:4] == [expected[byte >> 4] for byte in packed], packed
        assert halves[4:] == [expected[byte & 15] for byte in packed], packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_table_of_pairs(dtype: torch.dtype) -> None:
    triton_vector = pytest.importorskip("feinwerk.ops.nf4_linear.triton_vector")
    pairs = triton_vector.pairs_on(torch.device("cpu"), dtype)
    assembly = triton_vector.values_assembly(dtype is torch.float16)
    table = 1024
    for lane in (0, 5, 31):
        # Entry e of a lane: what the filling code says.
        memory = {
            table + 256 * (e & 127) + 128 * (e >> 7) + 4 * lane: int(pairs[e]) & WORD
            for e in range(256)
        }
        for first in range(256):
            packed = [first, (5 * first + 1) & 255, (77 * first + 130) & 255, 255 - first]
            inputs = {"$8": int.from_bytes(bytes(packed), "little"), "$10": table}
            out = run(assembly, inputs | {"$9": 0x04040404 * lane}, memory)
            words = torch.tensor([out[f"${i}"] for i in range(8)]).to(torch.int32)
            values = words.view(torch.float32).double() / triton_prmt.SCALES[dtype]
            codes = [code for byte in packed for code in (byte >> 4, byte & 15)]
            exact = torch.tensor([NF4_VALUES[code] for code in codes], dtype=torch.float64)
            # An odd bf16 value has the even one's bits behind its own: half a step more or less.
            loose = torch.tensor([1, 2 if dtype is torch.bfloat16 else 1] * 4)
            assert (
                (values - exact).abs() <= loose * exact.abs() * torch.finfo(dtype).eps / 2 + 1e-37
            ).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_codebooks_and_closer_than_unscaled(dtype: torch.dtype) -> None:
    exact = torch.tensor(NF4_VALUES, dtype=torch.float64)
    bits = torch.tensor(triton_prmt.target_bits(dtype), dtype=torch.int32).to(torch.int16)
    decoded = bits.view(dtype).double() / triton_prmt.SCALES[dtype]
    # Each is the nearest number of the dtype: half a step of it away at most.
    assert ((decoded - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2).all()
    assert decoded[NF4_VALUES.index(0.0)] == 0
    plain = exact.to(dtype).double() - exact
    assert (decoded - exact).square().mean() < plain.square().mean()


def test_the_number_of_instructions() -> None:
    for dtype in DTYPES:
        lines = triton_prmt.assembly(dtype).strip("{} ").split(";")
        names = [line.split()[0] for line in lines if line.strip()]
        # The move has no instruction: it renames.
        assert sum(name in ("shr.u32", "prmt.b32", "lop3.b32") for name in names) == 20


@pytest.mark.parametrize("code", range(16))
def test_an_odd_parity_is_refused(code: int) -> None:
    plane = [0] * 16
    plane[code] = 0x80
    with pytest.raises(ValueError, match="even parity"):
        triton_prmt.tables(plane)
