"""The inputs that the launchers are run on: a function an op, all on META tensors.

A new op adds its function to `_OPS`; a kernel that nothing here reaches wants one more input. An
input marked `everywhere` is compiled for every target in `make test`; the others for sm_90 there,
and for all of them in `make test-full`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.triton_aot import adapter_inputs, code_inputs, linear_inputs, optimizer_inputs
from tests.triton_aot.meta_tensors import Rows


@dataclass(frozen=True)
class Input:
    """Arguments of one op's Triton function."""

    op: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    everywhere: bool


_OPS: tuple[Callable[[], Rows], ...] = (
    optimizer_inputs.adamw_step,
    code_inputs.blockwise_dequantize,
    code_inputs.blockwise_quantize,
    adapter_inputs.lora_linear,
    adapter_inputs.lora_linear_backward,
    code_inputs.nf4_dequantize,
    code_inputs.nf4_embedding,
    linear_inputs.nf4_linear,
    linear_inputs.nf4_linear_backward,
    code_inputs.nf4_quantize,
    optimizer_inputs.square_sum,
    adapter_inputs.weight_norm,
)


def inputs() -> list[Input]:
    """Return the whole table."""
    return [Input(rows.__name__, *row) for rows in _OPS for row in rows()]
