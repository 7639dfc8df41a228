"""What kernels work in: on the CPU by their plan, on CUDA what the reference backend needs.

The CPU's is kept from call to call. The sizes follow csrc/kernels/linear.cpp, linear_backward.cpp
and adapter_gradients.cpp, for one thread; each further thread adds half a megabyte. For CUDA there
is no Triton kernel yet: the reference decodes whole weights, and whole states in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from feinwerk.plan.architecture import Architecture
from feinwerk.plan.resident import local_numel, trained_tensors
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
# And of adamw_step, an element of a parameter, as counted: with moments as codes, else with a
# parameter in fp32, in bf16 with a remainder, in bf16 with random words.
_STEP_CODES, _STEP_FP32, _STEP_REMAINDER, _STEP_STOCHASTIC = 45, 28, 44, 164


@dataclass(frozen=True)
class Workspace:
    """Bytes that kernels work in.

    Attributes:
        kept: always there.
        layer: while a Linear is used.
        step: while the optimizer steps.
    """

    kept: int = 0
    layer: int = 0
    step: int = 0


def workspace(model: Architecture, settings: Settings) -> Workspace:
    """Return the workspace. torch's own products, of a full fine-tune, are taken to need none."""
    targeted = settings.targeted(model)
    ours = settings.quantized or targeted
    used = [m for m in model.linears if settings.quantized or m.name in targeted]
    if settings.device == "cuda":
        layer = max(_reference(m.N, m.K, settings) for m in used) if ours else 0
        return Workspace(layer=layer, step=_reference_step(model, settings))
    if not ours:
        return Workspace()
    S = settings.tokens * settings.r * FP32
    products = max(max(_forward(m.K, settings), _backward(m.N, m.K, settings) + S) for m in used)
    return Workspace(kept=max(products, _ADAPTER_SCRATCH + S))


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
    """W is decoded, and products are in fp32."""
    M, D = settings.tokens, settings.size
    decoded = N * K * (_DECODED_BYTES + (D if D != FP32 else 0)) if settings.quantized else 0
    sums = 3 + settings.dora  # y, delta, their sum, gain
    return max(decoded, (N * K + M * K + sums * M * N) * FP32)


def _reference_step(model: Architecture, settings: Settings) -> int:
    """One parameter after the other is decoded."""
    bf16 = (settings.adapter_dtype if settings.adapted else settings.dtype) == "bfloat16"
    each = _STEP_CODES if settings.state_bits == 8 else _STEP_FP32
    if bf16 and settings.bf16_params == "stochastic":
        each = _STEP_STOCHASTIC
    elif bf16:
        each = max(each, _STEP_REMAINDER)
    return each * max(local_numel(t, settings) for t in trained_tensors(model, settings))
