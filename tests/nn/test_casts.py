"""Whatever casts a model, the codes and tables keep dtype and bits; only `dtype` changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from feinwerk.nn import NF4Embedding, NF4Linear
from feinwerk.testing import assert_same_bits

HALF = torch.bfloat16


def make_model(double_quant: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        NF4Embedding.from_embedding(nn.Embedding(10, 33), double_quant=double_quant),
        NF4Linear.from_linear(nn.Linear(33, 12), double_quant=double_quant),
        nn.LayerNorm(12),
    )


def tensors(model: nn.Sequential) -> list[torch.Tensor]:
    held = []
    for layer in model[:2]:
        w = layer.nf4_weight
        held += [w.packed, w.absmax, w.nested_absmax, w.nested_codebook, w.nested_offset]
    return [t.detach() for t in held if t is not None]


def by_parameters(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.to(HALF)


def by_floating_parameters(model: nn.Module) -> None:
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(HALF)
    for layer in model[:2]:
        layer.to(HALF)


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "bfloat16()": lambda model: model.bfloat16(),
    "to(dtype)": lambda model: model.to(HALF),
    "to(tensor)": lambda model: model.to(torch.empty(0, dtype=HALF)),
    "to(device, dtype)": lambda model: model.to("cpu", HALF),
    "type()": lambda model: model.type(HALF),
    "_apply": lambda model: model._apply(lambda t: t.to(HALF)),
    "half, float, bfloat16": lambda model: model.half().float().bfloat16(),
    "parameters": by_parameters,
    "floating parameters": by_floating_parameters,
}


@pytest.mark.parametrize("swap", [False, True], ids=["set_data", "swap_tensors"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("name", CASTS)
def test_casts_change_the_output_dtype_only(name: str, double_quant: bool, swap: bool) -> None:
    model = make_model(double_quant)
    before = [t.clone() for t in tensors(model)]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        CASTS[name](model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for layer in model[:2]:
        assert layer.weight.dtype == torch.uint8
        assert layer.dtype == HALF
        assert not layer.weight.requires_grad
    for old, new in zip(before, tensors(model), strict=True):
        assert_same_bits(new, old)
    assert model[1].bias.dtype == HALF
    assert model[0](torch.tensor([1])).dtype == HALF
    assert model(torch.tensor([1])).dtype == HALF


def test_the_saved_state_has_the_codes_even_right_after_a_cast() -> None:
    model = make_model(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    by_parameters(model)
    for key, value in model.state_dict().items():
        if "quant_state" not in key and "2." not in key and "bias" not in key:
            assert_same_bits(value, before[key], key)


def test_double_leaves_the_weight_alone() -> None:
    model = make_model(True)
    before = [t.clone() for t in tensors(model)]
    model.double()
    assert model[1].dtype == torch.float32
    for old, new in zip(before, tensors(model), strict=True):
        assert_same_bits(new, old)


def test_moves_reach_every_tensor() -> None:
    model = make_model(True).to("meta")
    assert {t.device.type for t in tensors(model)} == {"meta"}
    empty = model.to_empty(device="cpu")
    assert {t.device.type for t in tensors(empty)} == {"cpu"}
    source = make_model(True)
    empty.load_state_dict(source.state_dict())
    for a, b in zip(tensors(empty), tensors(source), strict=True):
        assert_same_bits(a, b)
    both = make_model(True)._apply(lambda t: t.to("meta", HALF) if t.is_floating_point() else t)
    assert both[1].nested_absmax.dtype == torch.float32
    assert both[1].nested_absmax.device.type == "meta"
