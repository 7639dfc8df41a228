"""PEFT's own layers over the weights of ours, and the comparison of outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk.nn import Adapter, LoRAConv, LoRAEmbedding, NF4Embedding, NF4Linear
from feinwerk.nn.dora import DoRA
from feinwerk.testing import assert_within

peft = pytest.importorskip("peft")


class FixedMask(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, keep: torch.Tensor, p: float) -> None:
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep.view(x.shape), x, 0.0) / (1 - self.p)


def dense_base(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of our base, dense; W~, rounded to dtype, if it was NF4."""
    if isinstance(layer, NF4Linear):
        return copy.deepcopy(layer.to_linear(dtype))
    if isinstance(layer, NF4Embedding):
        return layer.to_embedding(dtype)
    return copy.deepcopy(layer)


def peft_twin(
    ours: Adapter, dtype: torch.dtype, base_dtype: torch.dtype, keep: torch.Tensor | None = None
) -> Any:
    """PEFT's layer with our weights, in dtype; the base is rounded to base_dtype first."""
    module = peft.tuners.lora.layer
    base = dense_base(ours.base_layer, base_dtype)
    config = peft.LoraConfig(
        r=ours.r, lora_alpha=ours.lora_alpha, use_dora=isinstance(ours, DoRA),
        use_rslora=ours.use_rslora, lora_bias=ours.lora_bias is not None,
        fan_in_fan_out=type(base).__name__ == "Conv1D" or isinstance(base, nn.Embedding),
    )  # fmt: skip
    if isinstance(ours, LoRAEmbedding):
        kind = module.Embedding
    elif isinstance(ours, LoRAConv):
        kind = {nn.Conv1d: module.Conv1d, nn.Conv2d: module.Conv2d, nn.Conv3d: module.Conv3d}[
            type(base)
        ]
    else:
        kind = module.Linear
    layer = kind(base, "default", config, r=ours.r, lora_alpha=ours.lora_alpha)
    layer.to(dtype)  # PEFT has cast the adapter to the base's dtype
    for name, value in tensors_of(layer, ours).items():
        value.data = getattr(ours, name).detach().reshape(value.shape).to(value.dtype)
    assert layer.scaling["default"] == ours.scaling
    if keep is not None:
        layer.lora_dropout["default"] = FixedMask(keep, ours.dropout)
    elif ours.dropout:
        layer.lora_dropout["default"] = nn.Dropout(ours.dropout)
    return layer.train(ours.training)


def tensors_of(layer: Any, ours: Adapter) -> dict[str, torch.Tensor]:
    """PEFT's parameters by our names."""
    if isinstance(ours, LoRAEmbedding):
        found = {
            "lora_A": layer.lora_embedding_A["default"],
            "lora_B": layer.lora_embedding_B["default"],
        }
    else:
        found = {
            "lora_A": layer.lora_A["default"].weight,
            "lora_B": layer.lora_B["default"].weight,
        }
    if ours.lora_bias is not None:
        found["lora_bias"] = layer.lora_B["default"].bias
    if isinstance(ours, DoRA):
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


def results(layer: Any, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradient of every parameter that ours or PEFT's layer trains, and of x."""
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(grad_y.to(y.dtype))
    return {"y": y.detach()} | ({"x": x.grad} if x.is_floating_point() else {})


def compare(
    ours: Adapter,
    x: torch.Tensor,
    grad_y: torch.Tensor,
    rounding: dict[str, torch.Tensor],
    *,
    seed: int | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """|ours - peft64| <= 2 max|peft - peft64| + rounding, for the output and every gradient."""
    floating = x.is_floating_point()
    dtype = x.dtype if floating else torch.float32
    found = {}
    for name, wide in (("exact", torch.float64), ("theirs", torch.float32)):
        twin = peft_twin(ours, wide, dtype, keep)
        if seed is not None:
            torch.manual_seed(seed)
        twin.zero_grad()
        found[name] = results(twin, x.to(wide) if floating else x, grad_y)
        for key, value in tensors_of(twin, ours).items():
            found[name][key] = value.grad.reshape(getattr(ours, key).shape)
        bias = getattr(twin.base_layer, "bias", None)
        if bias is not None:
            found[name]["bias"] = bias.grad
    if seed is not None:
        torch.manual_seed(seed)
    got = results(ours, x, grad_y)
    for key in found["exact"]:
        if key not in got:
            parameter = getattr(ours, key)
            assert parameter.grad is not None, key
            got[key] = parameter.grad
    assert got.keys() == found["exact"].keys()
    for key, value in got.items():
        truth = found["exact"][key]
        budget = rounding[key].expand(truth.shape)
        if truth.numel():
            rounded = found["theirs"][key].to(value.dtype).double()
            budget = budget + 2 * (rounded - truth).abs().max()
        assert_within(value, truth, budget, value.dtype, key)
