"""DoRA's norms: the one that a forward uses is always the fresh one, and caches are dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import quantize_model
from feinwerk.nn import DoRAConv, DoRAEmbedding, DoRALinear, NF4Embedding, NF4Linear
from feinwerk.testing import assert_same_bits, make_x

KINDS = ("dense", "nf4", "embedding", "nf4 embedding", "conv")


def make(kind: str, dropout: float = 0.0) -> tuple[Any, torch.Tensor]:
    """A DoRA layer after a little training, and an input."""
    torch.manual_seed(0)
    if "embedding" in kind:
        table = nn.Embedding(20, 12)
        base: Any = NF4Embedding.from_embedding(table) if "nf4" in kind else table
        layer: Any = DoRAEmbedding(base, 4, lora_alpha=8)
        x = torch.arange(10)
    elif kind == "conv":
        layer = DoRAConv(nn.Conv2d(3, 8, 3), 4, lora_alpha=8, dropout=dropout)
        x = make_x((2, 3, 5, 5), torch.float32)
    else:
        linear = nn.Linear(33, 12)
        base = NF4Linear.from_linear(linear) if kind == "nf4" else linear
        layer = DoRALinear(base, 4, lora_alpha=8, dropout=dropout)
        x = make_x((5, 33), torch.float32)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).add_(
                0.1 * make_x(tuple(getattr(layer, name).shape), torch.float32)
            )
    return layer, x


def fresh(layer: Any) -> Any:
    """The same layer without anything kept."""
    other = copy.deepcopy(layer)
    other.invalidate()
    return other


def assert_fresh(layer: Any, x: torch.Tensor) -> None:
    """The output is that of a layer which has kept nothing, with and without gradients."""
    with torch.no_grad():  # first: a forward with gradients would drop what is kept
        assert_same_bits(layer(x), fresh(layer)(x))
    assert_same_bits(layer(x).detach(), fresh(layer)(x).detach())
    dense = layer.merged_weight()
    norms = {
        DoRALinear: lambda: dense.double().norm(dim=1),
        DoRAConv: lambda: dense.double().flatten(1).norm(dim=1),
        DoRAEmbedding: lambda: dense.double().norm(dim=0),
    }[type(layer)]()
    # merged = gain (W + s B A) has norm |magnitude|: K terms of fp32 rounding on either side.
    bound = 4 * dense.numel() ** 0.5 * 2.0**-24 * norms
    assert ((layer.magnitude.double().abs() - norms).abs() <= bound).all()


def raw_sgd(layer: nn.Module) -> None:
    """An optimizer that writes past autograd: versions do not change."""
    for parameter in layer.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.05 * parameter.grad)


OPTIMIZERS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "sgd": lambda m: torch.optim.SGD(_trained(m), lr=0.05, momentum=0.9).step,
    "adamw": lambda m: torch.optim.AdamW(_trained(m), lr=0.05).step,
    "adamw foreach": lambda m: torch.optim.AdamW(_trained(m), lr=0.05, foreach=True).step,
    "raw": lambda m: lambda: raw_sgd(m),
}


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_fresh_after_every_step(kind: str, optimizer: str, training: bool) -> None:
    layer, x = make(kind)
    layer.train(training)
    step = OPTIMIZERS[optimizer](layer)
    before = layer.weight_norm()
    for _ in range(4):
        with torch.no_grad():
            layer(x)  # in eval mode this keeps the norm
        layer.zero_grad()
        layer(x).square().mean().backward()
        step()
        if optimizer == "raw":
            layer.invalidate()
        assert_fresh(layer, x)
    assert (layer.weight_norm() - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_and_when(kind: str) -> None:
    layer, x = make(kind)
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer._weight_norm is None
    layer.eval()
    layer(x)
    assert layer._weight_norm is None
    with torch.no_grad():
        layer(x)
        kept = layer._weight_norm[1]
        layer(x)
    assert layer._weight_norm[1] is kept
    assert kept.shape == layer.magnitude.shape
    assert_same_bits(kept, layer.weight_norm())
    assert not {"base_norm", "_weight_norm"} & set(layer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        "train",
        "eval",
        "load",
        "load all",
        "merge",
        "cast",
        "invalidate",
        "grad",
        "copy_",
        "scaling",
    ],
)
def test_what_drops_it(kind: str, change: str) -> None:
    layer, x = make(kind)
    other, _ = make(kind)
    layer.eval()
    with torch.no_grad():
        for parameter in other.parameters(recurse=False):
            parameter.mul_(1.5)
        layer(x)
        if change == "copy_":
            layer.lora_B.copy_(other.lora_B)
        elif change not in ("load", "load all"):
            layer.lora_B.data.copy_(other.lora_B)  # nobody is told
    if change in ("train", "eval"):
        getattr(layer, change)()
        layer.eval()
    elif change == "load":
        layer.load_state_dict(other.state_dict())
    elif change == "load all":
        nn.ModuleList([layer]).load_state_dict(nn.ModuleList([other]).state_dict())
    elif change == "merge":
        layer.merge()
        layer.unmerge()
    elif change == "cast":
        layer.to(torch.float32)
    elif change == "invalidate":
        layer.invalidate()
    elif change == "grad":
        layer(x)
    elif change == "scaling":
        layer.scaling *= 2
    assert_fresh(layer, x)


@pytest.mark.parametrize("kind", ["dense", "nf4", "conv"])
def test_a_base_that_changes(kind: str) -> None:
    layer, x = make(kind)
    other, _ = make(kind)
    with torch.no_grad():
        if kind == "nf4":
            other = DoRALinear(NF4Linear.from_linear(nn.Linear(33, 12)), 4, lora_alpha=8)
        else:
            other.weight.mul_(2)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert_fresh(layer, x)
    if kind == "dense":
        with torch.no_grad():
            layer.weight.mul_(3)
        layer.invalidate()
        assert_fresh(layer, x)
        holder = nn.ModuleList([layer])
        quantize_model(holder)
        assert isinstance(layer.base_layer, NF4Linear)
        assert_fresh(layer, x)


def test_the_norms_of_the_base_are_taken_once() -> None:
    layer, x = make("nf4")
    kept = layer.base_norm
    for _ in range(2):
        layer.train()
        layer(x).sum().backward()
        layer.eval()
        with torch.no_grad():
            layer(x)
        layer.merge()
        layer.unmerge()
    assert layer.base_norm is kept
    layer.bfloat16()
    layer(x.bfloat16())
    assert layer.base_norm.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_without_invalidate_a_raw_write_would_go_unseen(kind: str) -> None:
    layer, x = make(kind)
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer.lora_B.data.mul_(2)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_fresh(layer, x)


def test_inference_mode() -> None:
    layer, x = make("dense")
    layer.eval().invalidate()
    with torch.inference_mode():
        y = layer(x)
    assert_same_bits(layer(x).detach(), y.clone())
    layer.train()
    layer(x).sum().backward()
    assert layer.magnitude.grad is not None
