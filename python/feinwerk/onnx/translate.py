"""The translation table for calls of torch.ops.feinwerk.* in a user's own forward.

A call becomes the node that a layer would have become, without names: its tensors keep those that
the model gives them, and an adapter among them stays what it is in the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from feinwerk import _checks
from feinwerk.onnx.node_forms import ATTRIBUTES, DOMAIN, INPUTS

_OP = "export"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _node(kind: str) -> Any:
    """The operation as onnxscript calls it: any tensors, optional inputs, int attributes."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    tensors = [*_FLOATS, "tensor(uint8)", "tensor(int64)", "tensor(int32)"]
    inputs = [
        schema.FormalParameter(name, f"T{i}", param_option=optional)
        for i, name in enumerate(INPUTS[kind])
    ]
    constraints = [(f"T{i}", tensors, "") for i in range(len(inputs))]
    attributes = [
        schema.Attribute(name, onnx.defs.OpSchema.AttrType.INT, "", required=True)
        for name in ATTRIBUTES[kind]
    ]
    described = schema(
        kind, DOMAIN, 1, inputs=inputs, outputs=[schema.FormalParameter("y", "Y")],
        type_constraints=[*constraints, ("Y", _FLOATS, "")], attributes=attributes,
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, 1), kind, described)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch.onnx.export(dynamo=True) takes as custom_translation_table.

    Returns:
        The functions for nf4_linear, nf4_dequantize, nf4_embedding and lora_linear.

    Example:
        >>> torch.ops.feinwerk.nf4_linear.default in translation_table()  # doctest: +SKIP
        True
    """
    ops = torch.ops.feinwerk
    return {
        ops.nf4_linear.default: _nf4_linear,
        ops.nf4_embedding.default: _nf4_embedding,
        ops.nf4_dequantize.default: _nf4_dequantize,
        ops.lora_linear.default: _lora_linear,
    }


def _standard() -> Any:
    """The standard operators, as onnxscript calls them."""
    from onnxscript import opset18

    return opset18


def _like(value: Any, x: Any) -> Any:
    """The value in x's dtype."""
    op = _standard()

    return value if value is None or value.dtype == x.dtype else op.CastLike(value, x)


def _float(value: Any) -> Any:
    op = _standard()

    return value if int(value.dtype) == 1 else op.Cast(value, to=1)


def _nf4_linear(
    x: Any,
    packed: Any,
    absmax: Any,
    bias: Any = None,
    nested_absmax: Any = None,
    nested_codebook: Any = None,
    nested_offset: Any = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> Any:
    return _node("NF4Linear")(
        x, packed, absmax, _like(bias, x), nested_absmax, nested_codebook, nested_offset,
        N=N, K=K, block_size=blocksize,
    )  # fmt: skip


def _nf4_embedding(
    indices: Any,
    packed: Any,
    absmax: Any,
    nested_absmax: Any = None,
    nested_codebook: Any = None,
    nested_offset: Any = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    dtype: int = 1,
) -> Any:
    op = _standard()

    return _node("NF4Embedding")(
        op.Cast(indices, to=7), packed, absmax, nested_absmax, nested_codebook, nested_offset,
        N=N, K=K, block_size=blocksize, to=int(dtype),
    )  # fmt: skip


def _nf4_dequantize(
    packed: Any,
    absmax: Any,
    nested_absmax: Any = None,
    nested_codebook: Any = None,
    nested_offset: Any = None,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: int = 1,
) -> Any:
    """All rows of a table of one row, reshaped: the library needs no operator more."""
    op = _standard()

    sizes = [int(size) for size in shape]
    row = op.Constant(value_ints=[0])
    flat = _node("NF4Embedding")(
        row, packed, absmax, nested_absmax, nested_codebook, nested_offset,
        N=1, K=math.prod(sizes), block_size=blocksize, to=int(dtype),
    )  # fmt: skip
    return op.Reshape(flat, op.Constant(value_ints=sizes))


def _lora_linear(
    x: Any,
    weight: Any,
    absmax: Any,
    nested_absmax: Any,
    nested_codebook: Any,
    nested_offset: Any,
    bias: Any,
    lora_A: Sequence[Any],
    lora_B: Sequence[Any],
    scaling: Any,
    segments: Any,
    magnitude: Sequence[Any],
    base_norm: Any,
    weight_norm: Any,
    seed: Any,
    *,
    dropout_p: float = 0.0,
    blocksize: int = 64,
    compute: str = "exact",
) -> Any:
    op = _standard()

    if len(lora_A) != 1 or segments is not None:
        rule = "have one adapter in a traced call (export the layers, not grouped_lora_linear)"
        _checks.reject(NotImplementedError, _OP, "lora_linear", rule, f"{len(lora_A)} adapters")
    if dropout_p:
        rule = "be 0 in a traced call (call model.eval())"
        _checks.reject(ValueError, _OP, "lora_linear's dropout_p", rule, dropout_p)
    gain = None
    if magnitude:
        if weight_norm is None:
            rule = "be given to dora_linear in a traced call"
            _checks.reject(NotImplementedError, _OP, "weight_norm", rule, "None")
        norm = op.Squeeze(weight_norm, op.Constant(value_ints=[0]))
        zero = op.Constant(value_float=0.0)
        ratio = op.Div(_float(magnitude[0]), norm)
        gain = op.Where(op.Greater(norm, zero), ratio, zero)
    low_rank = (_float(lora_A[0]), _float(lora_B[0]), scaling, gain, _like(bias, x))
    if absmax is None:
        y = _node("LoraLinear")(x, _like(weight, x), *low_rank)
    else:
        N, K = int(lora_B[0].shape[0]), int(lora_A[0].shape[1])
        y = _node("NF4LoraLinear")(
            x, weight, absmax, *low_rank, nested_absmax, nested_codebook, nested_offset,
            N=N, K=K, block_size=blocksize,
        )  # fmt: skip
    # S and the norms are for the backward pass; nothing reads them here.
    return y, op.Identity(y), op.Identity(y)
