"""The two blocks of an exported decoder that are ONNX functions: RMSNorm and attention with cache.

Both stand in the graph as single nodes of domain `feinwerk.blocks`, with a function of standard ops
in the same file: every runtime can run them, and a trace does not spend most of its time on the
symbolic shapes of attention.

```
   q [B,S,H*D] ---+
   k [B,S,KV*D] --+- rotate by cos, sin -+- query [B,H,S,D] -> [B,KV,G*S,D] -+
                                         |                                   |
   past_key [B,KV,P,D] --------- concat -+- key [B,KV,P+S,D] ----------------@- softmax -+
   v [B,S,KV*D], past_value ---- concat --- value [B,KV,P+S,D] --------------------------@- y
```

The G = H / KV query heads of one key head are rows of one product: keys and values are never
repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

DOMAIN = "feinwerk.blocks"
VERSION = 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Put one RMSNorm node into the trace; a placeholder that computes nothing elsewhere.

    Args:
        x: [..., K].
        weight: [K].
    """
    symbolic: Any = torch.onnx.ops.symbolic
    y: torch.Tensor = symbolic(
        f"{DOMAIN}::RMSNorm", (x, weight), dtype=x.dtype, shape=x.shape, version=VERSION
    )
    return y


def cached_attention(
    projections: Sequence[torch.Tensor],
    past: Sequence[torch.Tensor],
    rotation: Sequence[torch.Tensor],
    bias: torch.Tensor,
    past_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put one CachedAttention node into the trace; a placeholder that computes nothing elsewhere.

    Args:
        projections: q [B, S, H*D], k and v [B, S, KV*D].
        past: key and value, [B, KV, P, D].
        rotation: cos and signed sin, [B, S, 1, D]: the first half of sin is negated.
        bias: [B, 1, G * S, P + S], added to the scores: once for each head of a group, so that no
            layer has to give the scores another shape.
        past_length: P, the same symbol for every layer.

    Returns:
        y [B, S, H*D], key and value [B, KV, P + S, D].
    """
    q, _, _ = projections
    batch, rows, _ = q.shape
    grown = (batch, past[0].shape[1], past_length + rows, past[0].shape[3])
    symbolic: Any = torch.onnx.ops.symbolic_multi_out
    y, key, value = symbolic(
        f"{DOMAIN}::CachedAttention",
        (*projections, *past, *rotation, bias),
        dtypes=(q.dtype,) * 3,
        shapes=(q.shape, grown, grown),
        version=VERSION,
    )
    return y, key, value


def functions(heads: int, kv_heads: int, head_size: int, eps: float, opset: int) -> list[Any]:
    """Return the FunctionProtos of both blocks for one model's sizes.

    Args:
        heads: H, query heads.
        kv_heads: KV, a divisor of H.
        head_size: D.
        eps: of the RMSNorm.
        opset: of the standard ops, the model's.

    Returns:
        The onnx.FunctionProto objects.
    """
    from onnx import parser

    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
    # The form that ONNX Runtime's own fusion knows (SimplifiedLayerNormalization).
    norm = f"""
    RMSNorm (x, weight) => (y) {{
        two = Constant <value_float = 2.0> ()
        last = Constant <value_ints = [-1]> ()
        eps = Constant <value_float = {eps!r}> ()
        squares = Pow (x, two)
        mean = ReduceMean (squares, last)
        shifted = Add (mean, eps)
        root = Sqrt (shifted)
        scaled = Div (x, root)
        y = Mul (scaled, weight)
    }}"""
    both = heads + kv_heads
    attention = f"""
    CachedAttention (q, k, v, past_key, past_value, cos, sin, bias) => (y, key, value) {{
        of_heads = Constant <value_ints = [0, 0, {both}, {head_size}]> ()
        of_values = Constant <value_ints = [0, 0, {kv_heads}, {head_size}]> ()
        of_groups = Constant <value_ints = [0, {kv_heads}, -1, {head_size}]> ()
        of_output = Constant <value_ints = [0, {heads}, -1, {head_size}]> ()
        flat = Constant <value_ints = [0, 0, {heads * head_size}]> ()
        counts = Constant <value_ints = [{heads}, {kv_heads}]> ()
        scale = Constant <value_float = {head_size**-0.5!r}> ()

        joined = Concat <axis = -1> (q, k)
        rows = Reshape (joined, of_heads)
        first, second = Split <axis = -1, num_outputs = 2> (rows)
        swapped = Concat <axis = -1> (second, first)
        straight = Mul (rows, cos)
        crossed = Mul (swapped, sin)
        rotated = Add (straight, crossed)
        by_head = Transpose <perm = [0, 2, 1, 3]> (rotated)
        query, new_key = Split <axis = 1> (by_head, counts)
        key = Concat <axis = 2> (past_key, new_key)
        value_rows = Reshape (v, of_values)
        new_value = Transpose <perm = [0, 2, 1, 3]> (value_rows)
        value = Concat <axis = 2> (past_value, new_value)

        grouped = Reshape (query, of_groups)
        small = Mul (grouped, scale)
        key_columns = Transpose <perm = [0, 1, 3, 2]> (key)
        scores = MatMul (small, key_columns)
        biased = Add (scores, bias)
        weights = Softmax <axis = -1> (biased)
        mixed = MatMul (weights, value)
        heads_out = Reshape (mixed, of_output)
        rows_out = Transpose <perm = [0, 2, 1, 3]> (heads_out)
        y = Reshape (rows_out, flat)
    }}"""
    return [parser.parse_function(header + text) for text in (norm, attention)]
