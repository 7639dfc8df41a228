"""What Feinwerk's operations mean, in standard ONNX operators: function bodies and plain graphs.

```
   packed ── byte -> two values ──> codes' values ── * absmax ──> W~ [N, K] ── round to x's dtype
   y = gain * (x W~^T + scaling * (x A^T) B^T) + bias           in fp32, then rounded once
```
The product codebook[code] * absmax is the one of `feinwerk.nf4_dequantize`, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.onnx.graph_writer import GraphWriter, Size, nf4_pairs

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16


@dataclass(frozen=True)
class NF4Values:
    """An NF4 weight in a graph: its values, and its sizes."""

    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_codebook: Any
    nested_offset: Any
    N: Size
    K: Size
    block_size: Size

    @property
    def nested(self) -> bool:
        """Whether absmax holds codes."""
        return self.nested_absmax is not None


@dataclass(frozen=True)
class LowRank:
    """An adapter in a graph. With `gain_may_be_empty`, [0] stands for no gain."""

    A: Any
    B: Any
    scaling: Any
    gain: Any = None
    gain_may_be_empty: bool = False


def _in_blocks(w: GraphWriter, flat: Any, have: Size, block: Size, scale: Any, blocks: Size) -> Any:
    """Return flat * its block's scale, in as many elements as the blocks have."""
    total = w.product(blocks, block)
    if not (isinstance(total, int) and total == have):
        missing = w.op("Sub", w.size(total), w.size(have))
        flat = w.op("Pad", flat, w.op("Concat", w.size(0), missing, axis=0))
    scaled = w.op("Mul", w.reshape(flat, -1, block), w.reshape(scale, -1, 1))
    return w.reshape(scaled, -1)


def expanded_absmax(w: GraphWriter, weight: NF4Values, blocks: Size) -> Any:
    """Return absmax as fp32 [blocks]."""
    if not weight.nested:
        return weight.absmax
    codes = w.op("Cast", w.reshape(weight.absmax, -1), to=6)
    values = w.op("Gather", weight.nested_codebook, codes, axis=0)
    groups: Size = w.op("Shape", weight.nested_absmax)
    if isinstance(blocks, int):
        groups = -(-blocks // NESTED_BLOCKSIZE)
    scaled = _in_blocks(w, values, blocks, NESTED_BLOCKSIZE, weight.nested_absmax, groups)
    if not (isinstance(blocks, int) and blocks % NESTED_BLOCKSIZE == 0):
        scaled = w.first(scaled, blocks)
    return w.op("Add", scaled, w.reshape(weight.nested_offset, 1))


def dequantized(w: GraphWriter, weight: NF4Values) -> Any:
    """Return W~ in fp32, [N, K]."""
    pairs = w.constant(nf4_pairs(), "feinwerk.nf4_pairs")
    codes = w.op("Cast", w.reshape(weight.packed, -1), to=6)
    flat = w.reshape(w.op("Gather", pairs, codes, axis=0), -1)
    n, block = w.product(weight.N, weight.K), weight.block_size
    blocks: Size
    have: Size
    if isinstance(n, int) and isinstance(block, int):
        blocks, have = -(-n // block), n + n % 2
    else:
        blocks, have = w.op("Shape", weight.absmax), w.op("Shape", flat)
    scaled = _in_blocks(w, flat, have, block, expanded_absmax(w, weight, blocks), blocks)
    if not (isinstance(n, int) and isinstance(block, int) and n == blocks * block):
        scaled = w.first(scaled, n)
    return w.reshape(scaled, weight.N, weight.K)


def as_float(w: GraphWriter, value: Any, dtype: int | None) -> Any:
    """Return a value of dtype (None: not known) as fp32."""
    return value if dtype == FLOAT else w.op("Cast", value, to=FLOAT)


def rounded(w: GraphWriter, value: Any, x: Any, dtype: int | None) -> Any:
    """Return an fp32 value rounded to x's dtype."""
    if dtype is None:
        return w.op("CastLike", value, x)
    return value if dtype == FLOAT else w.op("Cast", value, to=dtype)


def linear(
    w: GraphWriter,
    x: Any,
    weight: Any,
    low_rank: LowRank | None,
    bias: Any,
    N: Size,
    dtype: int | None,
) -> Any:
    """Return y for a weight [N, K] in x's dtype; see the top of the file."""
    wide = as_float(w, x, dtype)
    dense = w.op("Transpose", as_float(w, weight, dtype), perm=[1, 0])
    return finished(w, x, wide, w.op("MatMul", wide, dense), low_rank, bias, N, dtype)


def nf4_linear(
    w: GraphWriter,
    x: Any,
    weight: NF4Values,
    low_rank: LowRank | None,
    bias: Any,
    dtype: int | None,
) -> Any:
    """Return y for an NF4 weight."""
    dense = rounded(w, dequantized(w, weight), x, dtype)
    return linear(w, x, dense, low_rank, bias, weight.N, dtype)


def finished(
    w: GraphWriter,
    x: Any,
    wide: Any,
    y: Any,
    low_rank: LowRank | None,
    bias: Any,
    N: Size,
    dtype: int | None,
) -> Any:
    """Add adapter, gain and bias to the product y, fp32, and round to x's dtype."""
    if low_rank is not None:
        inner = w.op("MatMul", wide, w.op("Transpose", low_rank.A, perm=[1, 0]))
        outer = w.op("MatMul", inner, w.op("Transpose", low_rank.B, perm=[1, 0]))
        y = w.op("Add", y, w.op("Mul", outer, low_rank.scaling))
        y = _gained(w, y, low_rank, N)
    if bias is not None:
        y = w.op("Add", y, as_float(w, bias, dtype))
    return rounded(w, y, x, dtype)


def _gained(w: GraphWriter, y: Any, low_rank: LowRank, N: Size) -> Any:
    gain = low_rank.gain
    if gain is None:
        return y
    if low_rank.gain_may_be_empty:
        ones = w.op("ConstantOfShape", w.size(N), value=_one())
        gain = w.first(w.op("Concat", gain, ones, axis=0), N)
    return w.op("Mul", y, gain)


def _one() -> Any:
    import onnx_ir as ir

    return ir.tensor(np.ones(1, np.float32))


def nf4_embedding(w: GraphWriter, indices: Any, weight: NF4Values) -> Any:
    """Return the rows of the table in fp32, [..., K]; nothing of the table's size is made."""
    zero, last = w.constant(np.int64(0)), w.constant(np.array([-1], np.int64))
    columns = w.op("Range", zero, w.op("Squeeze", w.size(weight.K)), w.constant(np.int64(1)))
    start = w.op("Mul", w.op("Unsqueeze", indices, last), w.size(weight.K))
    element = w.op("Add", start, columns)
    two = w.constant(np.array([2], np.int64))
    byte = w.op("Gather", w.reshape(weight.packed, -1), w.op("Div", element, two), axis=0)
    pairs = w.reshape(w.constant(nf4_pairs(), "feinwerk.nf4_pairs"), -1)
    place = w.op("Add", w.op("Mul", w.op("Cast", byte, to=7), two), w.op("Mod", element, two))
    value = w.op("Gather", pairs, place, axis=0)
    block = w.op("Div", element, w.size(weight.block_size))
    scale = w.op("Gather", w.reshape(weight.absmax, -1), block, axis=0)
    if weight.nested:
        scale = w.op("Gather", weight.nested_codebook, w.op("Cast", scale, to=6), axis=0)
        group = w.op("Div", block, w.size(NESTED_BLOCKSIZE))
        scale = w.op("Mul", scale, w.op("Gather", weight.nested_absmax, group, axis=0))
        scale = w.op("Add", scale, w.reshape(weight.nested_offset, 1))
    return w.op("Mul", value, scale)


def lora_embedding(
    w: GraphWriter, rows: Any, indices: Any, low_rank: LowRank, N: Size, dtype: int | None
) -> Any:
    """Return gain * (rows + scaling * (A^T)[indices] B^T), N the table's columns."""
    wide = as_float(w, rows, dtype)
    inner = w.op("Gather", w.op("Transpose", low_rank.A, perm=[1, 0]), indices, axis=0)
    outer = w.op("MatMul", inner, w.op("Transpose", low_rank.B, perm=[1, 0]))
    y = w.op("Add", wide, w.op("Mul", outer, low_rank.scaling))
    return rounded(w, _gained(w, y, low_rank, N), rows, dtype)
