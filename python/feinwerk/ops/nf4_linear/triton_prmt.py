"""NF4 codes to bf16 or fp16 with byte permutes: eight weights in 20 instructions, no memory.

`prmt` picks four bytes out of eight by the low three bits of four selector nibbles; a selector's
top bit asks for eight copies of the byte's sign instead. The 16 values, times a constant c, are
split into two planes, their high and their low bytes, and a plane into a lower and an upper table
of eight. Four codes as they lie in `packed` are the selectors of the lower one:

```
   code            b3    b2     b1     b0     lower[code & 7], or for codes of 8..15 its sign
   mirror         ~b3  b2^b3  b1^b2  b0^b1    upper[mirror & 7], or for codes of 0..7 its sign
   plane                                      the exclusive or of the two
```

So a code meets the sign of one foreign entry, which is known and folded into its own. mirror, three
bits of the Gray code, costs two instructions and chains the entries by fours, j, 15 - j, 7 - j,
8 + j: signs exist exactly if bit 7 of the plane has even parity over each four. Bit 7 of the high
plane, the sign of the value, has (zero counts as negative). Bit 7 of the low plane has for some c
only: SCALES are those with the smallest rms error of round(c v) / c among them, smaller than with
c = 1. c is divided out of absmax. tests/ops/test_nf4_prmt.py runs the instructions over all bytes.
"""

from __future__ import annotations

import functools

import torch

from feinwerk.codebook import NF4_VALUES

# c. The rms error is 3.24e-4 for bf16 (5.50e-4 with c = 1) and 3.6e-5 for fp16 (8.1e-5).
SCALES = {torch.bfloat16: 0.7185, torch.float16: 0.787594}

_TOP = 0x88888888
# lop3's truth tables of (top ? ~code : code ^ half) and (lower ^ upper).
_MIRROR, _XOR = 0x1E, 0x3C

Words = tuple[int, int]


def target_bits(dtype: torch.dtype) -> list[int]:
    """The 16 bits of every c * value; zero is minus zero."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float64) * SCALES[dtype]
    values[NF4_VALUES.index(0.0)] = -0.0
    return [int(word) & 0xFFFF for word in values.float().to(dtype).view(torch.int16)]


def tables(plane: list[int]) -> tuple[Words, Words]:
    """Return the lower and the upper table, two words each, of a plane's 16 bytes."""
    top = [byte >> 7 for byte in plane]
    signs_low, signs_up = [0] * 8, [0] * 8
    for j in range(4):
        # plane[code]'s bit 7 = sign of its own entry ^ sign of the foreign one, around the four.
        signs_up[_upper(15 - j)] = top[j]
        signs_low[7 - j] = top[15 - j] ^ top[j]
        signs_up[_upper(8 + j)] = top[7 - j] ^ signs_low[7 - j]
        if signs_up[_upper(8 + j)] != top[8 + j]:
            chain = (j, 15 - j, 7 - j, 8 + j)
            raise ValueError(f"bit 7 of the codes {chain} must have even parity")
    low = [plane[j] ^ 0xFF * signs_up[_upper(j)] for j in range(8)]
    up = [0] * 8
    for code in range(8, 16):
        up[_upper(code)] = plane[code] ^ 0xFF * signs_low[code & 7]
    return _words(low), _words(up)


def _upper(code: int) -> int:
    """The entry that mirror points to."""
    return (code ^ code >> 1) & 7


def _words(table: list[int]) -> Words:
    first, second = bytes(table[:4]), bytes(table[4:])
    return int.from_bytes(first, "little"), int.from_bytes(second, "little")


@functools.cache
def assembly(dtype: torch.dtype) -> str:
    """PTX from four bytes, $4, to their even elements, $0 and $1, and odd elements, $2 and $3."""
    bits = target_bits(dtype)
    high = tables([word >> 8 for word in bits])
    low = tables([word & 0xFF for word in bits])
    lines = [
        ".reg .b32 half, code, mirror, lower, upper, h, l;",
        "shr.u32 half, $4, 1;",
        f"lop3.b32 mirror, $4, half, {_TOP:#x}, {_MIRROR:#x};",
        "mov.b32 code, $4;",
    ]
    for part in (0, 1):
        if part:
            lines += ["shr.u32 code, code, 16;", "shr.u32 mirror, mirror, 16;"]
        for to, (lower, upper) in (("h", high), ("l", low)):
            lines += [
                f"prmt.b32 lower, {lower[0]:#x}, {lower[1]:#x}, code;",
                f"prmt.b32 upper, {upper[0]:#x}, {upper[1]:#x}, mirror;",
                f"lop3.b32 {to}, lower, upper, 0, {_XOR:#x};",
            ]
        # The high nibble of a byte is the even element; a word takes those of two bytes.
        lines += [f"prmt.b32 ${part}, l, h, 0x7351;", f"prmt.b32 ${part + 2}, l, h, 0x6240;"]
    return "{ " + " ".join(lines) + " }"
