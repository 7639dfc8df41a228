"""Merging adapters into a base weight: the sum, what storing it costs, and the exact way back.

```
   W  --dequantize-->  fp32  --merged_weight-->  fp32  --store-->  like W   --swap_weight-->  layer
   ^                                                               + MergeReport                |
   |____________________________ restore_weight: the very same tensors ________________________|
```
Several adapters are chained through `merged_weight` and stored once: each storing into NF4 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.weight import NF4Weight

_OP = "merge"


@dataclass(frozen=True)
class MergeReport:
    """The error that storing a merged weight adds: re-quantizing to NF4, or rounding to a dtype.

    Args:
        max_error: the largest |stored - exact|, exact the merged weight in fp32.
        relative_error: ||stored - exact|| / ||exact||, Frobenius norms; 0 for an exact zero.
    """

    max_error: float
    relative_error: float

    def __str__(self) -> str:
        """Both errors in one line."""
        return f"max error {self.max_error:.3e}, relative error {self.relative_error:.3e}"


@dataclass(frozen=True)
class KeptWeight:
    """The tensors that `swap_weight` took out of a layer, for `restore_weight`."""

    weight: nn.Parameter | NF4Weight
    bias: nn.Parameter | None


def merged_weight(
    weight: torch.Tensor | NF4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float | torch.Tensor,
    gain: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Return gain (W + scaling B A) in fp32, W dequantized where it is NF4.

    The one weight-sized tensor that is made is the result.

    Args:
        weight: [N, K], or [K, N] when transposed (embeddings, transformers' Conv1D); more
            dimensions, as of a convolution, count as K.
        lora_A: [r, K].
        lora_B: [N, r].
        scaling: a float or a 0-dim tensor.
        gain: fp32 [N], DoRA's magnitude / weight_norm; None for LoRA.
        transposed: whether `weight` is held as [K, N].

    Returns:
        fp32, the shape of `weight`, contiguous.

    Raises:
        ValueError: if the adapter's shapes do not fit the weight's.

    Source:
        LoRA (arXiv 2106.09685), section 4.1; DoRA (arXiv 2402.09353), equation 5.

    Example:
        >>> merged_weight(torch.eye(2), torch.ones(1, 2), torch.ones(2, 1), scaling=0.5)
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """
    with torch.no_grad():
        if isinstance(weight, NF4Weight):
            dense = weight.dequantize(torch.float32)
        else:
            dense = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            dense.copy_(weight)
        matrix = dense.t() if transposed else dense.flatten(1)
        A, B = lora_A.detach().flatten(1).float(), lora_B.detach().flatten(1).float()
        if matrix.shape != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
            got = f"lora_B {tuple(lora_B.shape)} and lora_A {tuple(lora_A.shape)}"
            rule = f"fit the weight's [N, K] = {list(matrix.shape)}"
            _checks.reject(ValueError, _OP, "adapter", rule, got)
        factor = torch.as_tensor(scaling, dtype=torch.float32, device=B.device).detach()
        with torch.autocast(dense.device.type, enabled=False):
            matrix.addmm_(B * factor, A)
        if gain is not None:
            matrix.mul_(gain.detach().float()[:, None])
    return dense


@overload
def store(
    exact: torch.Tensor, like: NF4Weight, *, rule: str = "cpu"
) -> tuple[NF4Weight, MergeReport]: ...


@overload
def store(
    exact: torch.Tensor, like: torch.dtype, *, rule: str = "cpu"
) -> tuple[torch.Tensor, MergeReport]: ...


def store(
    exact: torch.Tensor, like: NF4Weight | torch.dtype, *, rule: str = "cpu"
) -> tuple[NF4Weight | torch.Tensor, MergeReport]:
    """Bring a merged fp32 weight into the format it is kept in, and report the error of that.

    Args:
        exact: fp32, `merged_weight`'s result.
        like: an NF4Weight whose blocksize, double quantization and dtype are taken over, or the
            dtype of a dense weight.
        rule: "cpu" or "cuda", whose rounding decisions the NF4 quantizer follows.

    Returns:
        (the stored weight, the report).

    Raises:
        ValueError: if the weight is not finite, or rule is unknown.

    Source:
        QLoRA (arXiv 2305.14314), section 3; docs/guides/plain_torch.md on what to expect.

    Example:
        >>> _, report = store(torch.tensor([[1.0, 0.5]]), NF4Weight.from_dense(torch.ones(1, 2)))
        >>> round(report.max_error, 3)
        0.059
    """
    if not exact.is_meta and not bool(exact.isfinite().all()):
        count = int((~exact.isfinite()).sum())
        rule_text = "be finite (the adapter seems to be broken)"
        _checks.reject(ValueError, _OP, "merged weight", rule_text, f"{count} bad elements")
    if isinstance(like, torch.dtype):
        dense = exact.to(like)
        return dense, _report(dense.float(), exact)
    new = NF4Weight.from_dense(
        exact, blocksize=like.blocksize, double_quant=like.double_quant, rule=rule
    )
    return new.to(dtype=like.dtype), _report(new.dequantize(torch.float32), exact)


def _report(stored: torch.Tensor, exact: torch.Tensor) -> MergeReport:
    """Overwrites `stored` with the error, unless it is `exact` itself."""
    if stored is exact:
        return MergeReport(0.0, 0.0)
    size = float(torch.linalg.vector_norm(exact))
    error = stored.sub_(exact)
    relative = float(torch.linalg.vector_norm(error)) / size if size > 0 else 0.0
    return MergeReport(float(torch.linalg.vector_norm(error, torch.inf)), relative)


def swap_weight(
    layer: nn.Module, weight: torch.Tensor | NF4Weight, bias: torch.Tensor | None = None
) -> KeptWeight:
    """Give a layer another weight (and bias), and return the tensors it had.

    The layer gets new parameters instead of new values, so that a weight tied to another layer
    keeps its values there, and `restore_weight` returns the very tensors.

    Args:
        layer: an NF4Linear or NF4Embedding for an NF4Weight, a dense layer for a tensor.
        weight: the new weight; it is frozen.
        bias: the new bias; None leaves it as it is.

    Returns:
        What `restore_weight` takes.

    Raises:
        TypeError: if the layer does not hold its weight in the format given.
        ValueError: if a bias is given to a layer that has none, or the layer's rows have been
            viewed for sharding.

    Source:
        docs/guides/plain_torch.md.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight
        >>> kept = swap_weight(layer, torch.zeros(2, 2))
        >>> restore_weight(layer, kept)
        >>> layer.weight is before
        True
    """
    if isinstance(layer, NF4Module) != isinstance(weight, NF4Weight):
        rule = "be in the format of the layer"
        got = f"{type(weight).__name__} for {type(layer).__name__}"
        _checks.reject(TypeError, _OP, "weight", rule, got)
    old_bias = layer._parameters.get("bias")
    if bias is not None and old_bias is None:
        _checks.reject(ValueError, _OP, "bias", "be None for a layer without one", "a tensor")
    if isinstance(layer, NF4Module):
        if layer.by_rows:
            rule = "be merged before shard_nf4, or after dequantize_model"
            _checks.reject(ValueError, _OP, "weight", rule, "rows viewed for sharding")
        kept = KeptWeight(layer.nf4_weight, old_bias)
        assert isinstance(weight, NF4Weight)
        layer._hold(weight)
    else:
        old = layer._parameters["weight"]
        assert old is not None
        assert isinstance(weight, torch.Tensor)
        kept = KeptWeight(old, old_bias)
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None and old_bias is not None:
        new_bias = nn.Parameter(bias.to(old_bias.dtype), requires_grad=old_bias.requires_grad)
        layer._parameters["bias"] = new_bias
    return kept


def restore_weight(layer: nn.Module, kept: KeptWeight) -> None:
    """Put the tensors that `swap_weight` returned back: the same bits, the same parameters.

    Where the layer has been moved or cast meanwhile, they follow it; NF4 codes are never cast.

    Args:
        layer: the one given to `swap_weight`.
        kept: what it returned.

    Source:
        docs/guides/plain_torch.md.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> restore_weight(layer, swap_weight(layer, torch.zeros(2, 2)))
    """
    current, current_bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert current is not None
    if isinstance(kept.weight, NF4Weight):
        assert isinstance(layer, NF4Module)
        layer._hold(kept.weight.to(current.device, dtype=layer.dtype))
    else:
        layer._parameters["weight"] = _following(kept.weight, current)
    if kept.bias is not None and current_bias is not None:
        layer._parameters["bias"] = _following(kept.bias, current_bias)


def _following(parameter: nn.Parameter, current: torch.Tensor) -> nn.Parameter:
    if parameter.device != current.device or parameter.dtype != current.dtype:
        parameter.data = parameter.data.to(current.device, current.dtype)
    return parameter
