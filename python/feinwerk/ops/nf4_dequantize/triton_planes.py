"""NF4 codes to exact fp32 values with byte permutes: 46 instructions for 8 weights, no memory.

`prmt` picks four bytes out of eight by the low three bits of four selector nibbles. The 16 values
are held as four planes, one a byte of fp32, and each plane as a lower and an upper table of eight
bytes. Four codes, as they lie in `packed`, are a selector:

```
   codes & 7                   ->  a byte of the lower and one of the upper table   two prmt a plane
   a code's top bit            ->  which of the two                                 one prmt a plane
   four planes of four codes   ->  four fp32 words                                  eight prmt
```
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from feinwerk.codebook import NF4_VALUES


def assembly() -> str:
    """PTX: $8 is four bytes of codes, $0..$3 their even values and $4..$7 their odd ones."""
    planes = np.array(NF4_VALUES, dtype="<f4").view(np.uint8).reshape(16, 4).T
    lines = [
        "{ .reg .b32 codes, side, low, high, below, above, p<4>, t<4>;",
        "and.b32 codes, $8, 0x77777777;",
        "shr.u32 side, $8, 1;",
        "and.b32 side, side, 0x44444444;",
        "or.b32 side, side, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 codes, codes, 16;", "shr.u32 side, side, 16;"]
        for plane, values in enumerate(planes):
            tables = [int(word) for word in values.copy().view("<u4")]
            lines += [
                f"mov.b32 low, {tables[0]:#010x};",
                f"mov.b32 high, {tables[1]:#010x};",
                "prmt.b32 below, low, high, codes;",
                f"mov.b32 low, {tables[2]:#010x};",
                f"mov.b32 high, {tables[3]:#010x};",
                "prmt.b32 above, low, high, codes;",
                f"prmt.b32 p{plane}, below, above, side;",
            ]
        lines += [
            "prmt.b32 t0, p0, p1, 0x5140;",
            "prmt.b32 t1, p2, p3, 0x5140;",
            "prmt.b32 t2, p0, p1, 0x7362;",
            "prmt.b32 t3, p2, p3, 0x7362;",
        ]
        # The low nibble, the odd element, comes first.
        for byte, (left, right) in enumerate((("t0", "t1"), ("t2", "t3"))):
            lines += [
                f"prmt.b32 ${4 + 2 * half + byte}, {left}, {right}, 0x5410;",
                f"prmt.b32 ${2 * half + byte}, {left}, {right}, 0x7632;",
            ]
    return "\n".join([*lines, "}"])


_ASSEMBLY = tl.constexpr(assembly())


@triton.jit
def planes(packed):
    """The two exact fp32 codebook values of every byte: (even element, odd element)."""
    return tl.inline_asm_elementwise(
        _ASSEMBLY,
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        args=[packed],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )
