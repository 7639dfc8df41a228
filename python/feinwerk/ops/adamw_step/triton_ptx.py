"""The element's work of adamw_step in PTX: 8-bit codes and the quotient, without a barrier.

```
   shared memory   decoded m | decoded v | encoding m | encoding v      filled once by each program
   decode          value = table[code]
   encode          key   = bits of the scaled moment, ascending with it
                   entry = table[upper bits of key]       at most one midpoint in there
                   code  = upper byte of entry + key << SHIFT
```
An entry holds the code at its lower end, less what the key itself adds to the upper byte, and such
a number that the key's lower bits carry when they are above those of the midpoint: exactly the
nearest code, ties to the lower. tests/ops/test_adamw_step_codes.py looks at every entry.

NVIDIA only: triton_codes.py has the same for every target and the interpreter.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from feinwerk.codebook import dynamic_map

# Magnitudes of scaled moments are raised to the lowest key, which has the code of zero.
_LOW, _LOW_SQ, _ONE = 0x34800000, 0x34000000, 0x3F800000  # fp32 bits of 2^-22, 2^-23, 1
_MIRROR = 0x1FFFFFFF  # of the bits that a negative number's key has inverted
_LOST, _LOST_SQ = 17, 16  # lower bits of a key; the upper ones are the number of its entry
_FIRST, _FIRST_SQ = (_ONE ^ _MIRROR) >> _LOST, _LOW_SQ >> _LOST_SQ
_COUNT, _COUNT_SQ = (_ONE >> _LOST) + 1 - _FIRST, (_ONE >> _LOST_SQ) + 1 - _FIRST_SQ
CUTS = {True: (_LOST, _FIRST, _COUNT), False: (_LOST_SQ, _FIRST_SQ, _COUNT_SQ)}
_WORDS = -(-(512 + _COUNT + _COUNT_SQ) // 4) * 4

# Bytes from the beginning to where entry 0 would be.
_MAP_SQ = tl.constexpr(4 * 256)
_ENCODE = tl.constexpr(4 * (512 - _FIRST))
_ENCODE_SQ = tl.constexpr(4 * (512 + _COUNT - _FIRST_SQ))

# Where nothing in the quotient over- or underflows: with eps and moments between these, the root
# is below 2^20, the denominator in [2^-40, 2^35], and remainders are exact.
_LEAST_EPS, _MOST_EPS = tl.constexpr(2.0**-40), tl.constexpr(2.0**20)
_MOST_CORRECTION, _MOST = tl.constexpr(2.0**14), tl.constexpr(2.0**40)
# Twice the bits of 2^-90, less 2; a zero, whose doubled bits less 1 wrap around, is above it.
_LEAST = tl.constexpr(2 * (127 - 90 << 23) - 2)
_DOWN = tl.constexpr(2.0**-32)


def entries(signed: bool) -> torch.Tensor:
    """int64 [count]: the entries of an encoding table; what no key reaches is of no meaning."""
    lost, first, count = CUTS[signed]
    values = dynamic_map(signed, "cpu")
    middle = (values[:-1] + values[1:]) * 0.5
    number = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
    low = number << lost
    base = torch.bucketize(value_of(low, signed), middle)
    last = torch.bucketize(value_of(low + (1 << lost) - 1, signed), middle)
    if not signed:
        base, last = base.clamp(min=1), last.clamp(min=1)  # the code of zero is given otherwise
    at = key_of(middle[base.clamp(max=254)], signed) & (1 << lost) - 1
    carry = torch.where(last > base, (1 << lost) - 1 - at, 0)
    return (base - number << 24) + (carry << 24 - lost) & 0xFFFFFFFF


def value_of(key: torch.Tensor, signed: bool) -> torch.Tensor:
    """The fp32 number of a key (int64)."""
    if not signed:
        return key.to(torch.int32).view(torch.float32)
    negative = key < 0x30000000
    bits = torch.where(negative, key ^ _MIRROR, key).to(torch.int32)
    return torch.where(negative, -1.0, 1.0) * bits.view(torch.float32)


def key_of(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """The key (int64) of an fp32 number."""
    bits = x.abs().clamp(min=2.0**-22 if signed else 2.0**-23).view(torch.int32).long()
    return torch.where(x < 0, bits ^ _MIRROR, bits) if signed else bits


@functools.cache
def words_on(device: torch.device) -> torch.Tensor:
    """Return what a program copies to shared memory: int32, made once."""
    maps = [dynamic_map(signed, "cpu").view(torch.int32) for signed in (True, False)]
    words = torch.cat([*maps, *(entries(signed).to(torch.int32) for signed in (True, False))])
    return torch.nn.functional.pad(words, (0, _WORDS - len(words))).to(device)


_FILL = tl.constexpr(f"""{{
.shared .align 16 .b32 adamw_words[{_WORDS}];
.reg .b32 at, to, threads, a, b, c, d;
.reg .b64 from;
.reg .pred more;
mov.u32 at, %tid.x;
mov.u32 threads, %ntid.x;
mov.u32 $0, adamw_words;
setp.lt.u32 more, at, {_WORDS // 4};
fill:
@!more bra filled;
mad.wide.u32 from, at, 16, $1;
mad.lo.u32 to, at, 16, $0;
ld.global.nc.v4.b32 {{a, b, c, d}}, [from];
st.shared.v4.b32 [to], {{a, b, c, d}};
add.u32 at, at, threads;
setp.lt.u32 more, at, {_WORDS // 4};
bra fill;
filled:
bar.sync 0;
}}""")


def _decode() -> str:
    """Four codes of a word; $0 to $3: values, $4: codes, $5: where the table begins."""
    lines = []
    for i in range(4):
        lines.append(f"bfe.u32 at, $4, {8 * i}, 8; mad.lo.u32 at, at, 4, $5;")
        lines.append(f"ld.shared.b32 ${i}, [at];")
    return "{ .reg .b32 at; " + " ".join(lines) + " }"


def _encode(signed: bool) -> str:
    """Four codes into a word, $0; from $1: moments, then reciprocals, the table's beginning."""
    lost, low = (_LOST, _LOW) if signed else (_LOST_SQ, _LOW_SQ)
    lines = [".reg .f32 x, a; .reg .b32 s, at, e0, e1, e2, e3; .reg .pred p;"]
    for i in range(4):
        e = f"e{i}"
        lines.append(f"mul.rn.f32 x, ${1 + i}, ${5 + i};")
        if signed:
            # x XOR its sign's mask AND the mirror: 0x78.
            lines.append(f"abs.f32 a, x; max.f32 a, a, 0f{low:08x}; mov.b32 s, x; mov.b32 {e}, a;")
            lines.append(f"shr.s32 s, s, 31; lop3.b32 {e}, {e}, s, {_MIRROR}, 0x78;")
        else:
            lines.append(f"max.f32 a, x, 0f{low:08x}; mov.b32 {e}, a;")
        lines.append(f"shr.u32 at, {e}, {lost}; mad.lo.u32 at, at, 4, ${9 + i};")
        lines.append(f"ld.shared.b32 s, [at]; mad.lo.u32 {e}, {e}, {1 << 24 - lost}, s;")
        if not signed:
            lines.append(f"setp.gt.f32 p, ${1 + i}, ${13 + i}; selp.b32 {e}, {e}, 0, p;")
    lines.append("prmt.b32 e0, e0, e1, 0x0073; prmt.b32 e2, e2, e3, 0x0073;")
    lines.append("prmt.b32 $0, e0, e2, 0x5410;")
    return "{ " + "\n".join(lines) + " }"


def _quotient(n: int) -> str:
    """Write m / (sqrt(v) correction + eps) of n elements, every operation rounded to nearest.

    From $n: m, v, correction / 2^32, eps, the limit. One Newton step for the reciprocal and one
    remainder for the quotient, one remainder for the root: what the compiler writes for a rounded
    division and root where it has tested their ranges, which is done for all n at once here. Any
    element out of range sends all n to the rounded division and root themselves.

    The root is of 2^64 v, so that v may be the smallest number; zero becomes 2^-126, whose root
    is nothing beside eps. The remainder is negated, so that -0 stays.
    """
    m, v, c, eps, limit = (range(k * n, k * n + n) for k in range(1, 6))
    lines = [".reg .f32 a, s, h, r, e, q; .reg .b32 u, least; .reg .pred out;"]
    lines.append("mov.b32 least, -1;")
    for i in range(n):
        lines.append(f"mov.b32 u, ${m[i]}; mad.lo.u32 u, u, 2, -1; min.u32 least, least, u;")
    # A thread's elements may be of several blocks; where they are of one, this is one register.
    lines.append(f"mov.b32 u, ${limit[0]};")
    lines += [f"max.u32 u, u, ${at};" for at in limit[1:]]
    lines.append("setp.le.u32 out, least, u; @out bra slow;")
    for i in range(n):
        lines.append(f"fma.rn.f32 a, ${v[i]}, 0f5f800000, 0f00800000;")  # 2^64, 2^-126
        lines.append("rsqrt.approx.ftz.f32 r, a; mul.rn.f32 s, a, r; mul.rn.f32 h, r, 0f3f000000;")
        lines.append("neg.f32 e, s; fma.rn.f32 e, e, s, a; fma.rn.f32 s, e, h, s;")
        lines.append(f"mul.rn.f32 s, s, ${c[0]}; add.rn.f32 s, s, ${eps[0]};")
        lines.append("rcp.approx.ftz.f32 r, s; neg.f32 h, s; fma.rn.f32 e, h, r, 0f3f800000;")
        lines.append(f"fma.rn.f32 r, r, e, r; mul.rn.f32 q, ${m[i]}, r;")
        lines.append(f"neg.f32 h, ${m[i]}; fma.rn.f32 e, s, q, h; neg.f32 e, e;")
        lines.append(f"fma.rn.f32 ${i}, e, r, q;")
    lines.append(f"bra done; slow: mul.rn.f32 h, ${c[0]}, 0f4f800000;")  # 2^32
    for i in range(n):
        lines.append(f"sqrt.rn.f32 s, ${v[i]}; mul.rn.f32 s, s, h; add.rn.f32 s, s, ${eps[0]};")
        lines.append(f"div.rn.f32 ${i}, ${m[i]}, s;")
    lines.append("done:")
    return "{ " + "\n".join(lines) + " }"


_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.f32 [$1], $2; mov.u32 $0, 0; }"
)
_DECODE = tl.constexpr(_decode())
_ENCODE_PTX, _ENCODE_SQ_PTX = tl.constexpr(_encode(True)), tl.constexpr(_encode(False))
_QUOTIENT = tl.constexpr(_quotient(8))
_QUOTIENT_REGISTERS = tl.constexpr(",".join(["=&f"] * 8 + ["f"] * 32 + ["r"] * 8))


@triton.jit
def fill(words_ptr):
    """Copy the tables to shared memory; where they begin there. Once in a kernel."""
    return tl.inline_asm_elementwise(
        _FILL, "=r,l", [words_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def decode(codes, tables, SIGNED: tl.constexpr):
    """The values of codes (uint8)."""
    return tl.inline_asm_elementwise(
        _DECODE, "=&r,=&r,=&r,=&r,r,r,r,r,r", [codes, tables if SIGNED else tables + _MAP_SQ],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def encode(x, inverse, tables):
    """The nearest codes (uint8) of the signed map to x * inverse; NaN counts as zero."""
    return tl.inline_asm_elementwise(
        _ENCODE_PTX, "=r,f,f,f,f,f,f,f,f,r,r,r,r", [x, inverse, tables + _ENCODE],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def encode_positive(x, inverse, tables):
    """The nearest codes (uint8) of the unsigned map to x * inverse; NaN counts as zero.

    The code of zero is taken for zero only, and where the reciprocal is none.
    """
    least = tl.where(inverse > 0, 0.0, float("inf"))
    return tl.inline_asm_elementwise(
        _ENCODE_SQ_PTX, "=r,f,f,f,f,f,f,f,f,r,r,r,r,f,f,f,f",
        [x, inverse, tables + _ENCODE_SQ, least], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def store(ptr, value, mask):
    """Store fp32 numbers by all threads that have them: no exchange through shared memory first."""
    tl.inline_asm_elementwise(
        _STORE, "=r,l,f,r", [ptr.to(tl.int64), value, mask.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def reciprocal(x):
    """1 / x, rounded."""
    return tl.inline_asm_elementwise(
        "rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quotient(m, v, most, correction, floor):
    """Find m / (sqrt(v) correction + floor), rounded each time; most: of |m| and v, by blocks."""
    usual = (floor >= _LEAST_EPS) & (floor <= _MOST_EPS) & (correction <= _MOST_CORRECTION)
    limit = tl.where((most <= _MOST) & usual, _LEAST, 0xFFFFFFFF).to(tl.uint32)
    return tl.inline_asm_elementwise(
        _QUOTIENT, _QUOTIENT_REGISTERS, [m, v, correction * _DOWN, floor, limit],
        dtype=tl.float32, is_pure=True, pack=8,
    )  # fmt: skip
