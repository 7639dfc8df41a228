"""What the kernels behind the layers' Linears work in: on the CPU by their plan, on CUDA decoded W.

The CPU's is kept from call to call. The sizes follow csrc/kernels/linear.cpp and
linear_backward.cpp, for one thread; each further thread adds its scratch, half a megabyte.
"""

from __future__ import annotations

from feinwerk.plan.architecture import Architecture
from feinwerk.plan.saved import FP32
from feinwerk.plan.settings import Settings

# Rows of x that are packed at once, and what they take at most.
_CHUNK_ROWS, _PACKED_BYTES = 1024, 16 << 20
# A depth block in units of 4 bytes, the rows of W decoded together, and columns in the backward.
_DEPTH, _PANEL_ROWS, _SLAB, _WIDE_SLAB, _WIDE = 256, 96, 64, 256, 2048
# What a thread needs for the gradients of A and B (csrc/kernels/adapter_gradients.cpp).
_ADAPTER_SCRATCH = 386 << 10
# The reference backend, bytes an element of W at their most: codes, values, scales, their product
# (1 + 3 * 4), and W in the activations' dtype.
_DECODED_BYTES = 13


def workspace(model: Architecture, settings: Settings) -> int:
    """Bytes of workspace. torch's own products, of a full fine-tune, are taken to need none."""
    if not settings.adapted:
        return 0
    targeted = settings.targeted(model)
    used = [m for m in model.linears if settings.quantized or m.name in targeted]
    if settings.device == "cuda":
        return max(_reference(m.N, m.K, settings) for m in used)
    S = settings.tokens * settings.r * FP32
    products = max(max(_forward(m.K, settings), _backward(m.N, m.K, settings) + S) for m in used)
    return max(products, _ADAPTER_SCRATCH + S)


def _rows(row_bytes: int, tokens: int) -> int:
    fitting = _PACKED_BYTES // row_bytes // 64 * 64
    return min(max(64, min(fitting, _CHUNK_ROWS)), -(-tokens // 16) * 16)


def _forward(K: int, settings: Settings) -> int:
    rows = _rows(K * settings.size, settings.tokens)
    adapter = -(-settings.r // 16) * 16 if settings.dora else 0  # A is packed beside x
    return (rows + adapter) * K * settings.size + _PANEL_ROWS * (_DEPTH + rows) * FP32


def _backward(N: int, K: int, settings: Settings) -> int:
    depth = _DEPTH * 4 // settings.size
    row_bytes = -(-N // depth) * _DEPTH * 4
    rows = _rows(row_bytes, settings.tokens)
    slab = _WIDE_SLAB if K >= _WIDE else _SLAB
    unit = slab * (max(1, min(4, (512 << 10) // (rows * slab * 4))) if K >= _WIDE else 1)
    return rows * row_bytes + (slab * _DEPTH + rows * unit) * FP32


def _reference(N: int, K: int, settings: Settings) -> int:
    """No Triton kernel yet, CUDA runs the reference: W is decoded, and products are in fp32."""
    M, D = settings.tokens, settings.size
    decoded = N * K * (_DECODED_BYTES + (D if D != FP32 else 0)) if settings.quantized else 0
    sums = 3 + settings.dora  # y, delta, their sum, gain
    return max(decoded, (N * K + M * K + sums * M * N) * FP32)
