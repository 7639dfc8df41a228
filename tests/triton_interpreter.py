"""Mends bf16 in Triton's interpreter, which computes with the raw 16 bits as if they were integers.

Arithmetic, comparisons and dots on bf16 are taken in fp32 and rounded to the nearest bf16, and
casts to bf16 round instead of cutting off: what the hardware does.
tests/ops/test_triton_interpreter.py shows that it is needed and that it is right. Only the
interpreter is touched, never a kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BITWISE = {
    np.bitwise_and,
    np.bitwise_or,
    np.bitwise_xor,
    np.left_shift,
    np.right_shift,
}
_COMPARISONS = {
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
    np.equal,
    np.not_equal,
}
_NAN = np.uint16(0x7FC0)


def widened(bits: Any) -> Any:
    """bf16 bits as fp32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Any) -> Any:
    """fp32 values as the bits of the nearest bf16, ties to even."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    even = (word >> 16) & 1
    bits = ((word.astype(np.uint64) + 0x7FFF + even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _NAN, bits).reshape(np.shape(values))


def mend_bf16() -> None:
    """Replace the four methods of the interpreter that see bf16; once a process."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "mended_bf16", False):
        return
    handle = interpreter.TensorHandle
    cast, dot, binary, unary = (
        builder.cast_impl,
        builder.create_dot,
        builder.binary_op,
        builder.unary_op,
    )

    def is_bf16(tensor: Any) -> bool:
        return bool(tensor.dtype.scalar == tl.bfloat16)

    def wide(tensor: Any) -> Any:
        return handle(widened(tensor.data), tl.float32) if is_bf16(tensor) else tensor

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if src.dtype.scalar == dst.scalar:
            return src
        if dst.scalar == tl.bfloat16:
            return handle(rounded(wide(src).data.astype(np.float32)), tl.bfloat16)
        return cast(self, wide(src), dst)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bf16(left) or op in _BITWISE:
            return binary(self, left, right, op)
        result = op(widened(left.data), widened(right.data))
        if op in _COMPARISONS:
            return handle(result, tl.int1)
        return handle(rounded(result), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if is_bf16(arg):
            return handle(rounded(op(widened(arg.data))), tl.bfloat16)
        return unary(self, arg, op)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.mended_bf16 = True
