"""LoRA and DoRA over embeddings and convolutions against PEFT's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_layers import compare, peft_twin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from feinwerk.nn import (
    DoRAConv,
    DoRAEmbedding,
    LoRAConv,
    LoRAEmbedding,
    NF4Embedding,
)
from feinwerk.testing import DTYPES, assert_same_bits, make_x, ulp

U = 2.0**-24


def fill(layer: Any) -> Any:
    """Random parameters, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name == "magnitude":
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                nn.init.normal_(parameter, std=0.3)
    return layer


def make_embedding(
    dora: bool, V: int, D: int, r: int, base: str = "dense", dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:  # fmt: skip
    torch.manual_seed(V + D)
    table: Any = nn.Embedding(V, D, dtype=dtype, **options)
    if base != "dense":
        table = NF4Embedding.from_embedding(table, double_quant=base == "nested")
    return fill((DoRAEmbedding if dora else LoRAEmbedding)(table, r, lora_alpha=3))


def make_conv(dora: bool, base: nn.Module, r: int = 4, **options: Any) -> Any:
    return fill((DoRAConv if dora else LoRAConv)(base, r, lora_alpha=3, **options))


def rounding(layer: Any, x: torch.Tensor, grad_y: torch.Tensor, depth: int) -> dict[str, Any]:
    """4 sqrt(depth) 2^-24 times the sum of the sizes of all terms, and the roundings.

    The sizes are what LoRA of absolute values gives. DoRA's products are (1 + its largest gain) of
    them at most, under dropout of 1 / (1 - p) of that.
    """
    sizes = copy.deepcopy(layer)
    dora = hasattr(layer, "magnitude")
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "lora_bias"):
            if getattr(sizes, name) is not None:
                getattr(sizes, name).abs_()
        base = sizes.base_layer
        if isinstance(base, NF4Embedding):
            base = sizes.base_layer = base.to_embedding()
        base.weight.abs_()
        if getattr(base, "bias", None) is not None:
            base.bias.abs_()
    sizes = sizes.float()
    gain = 1.0 + float(layer._gain().detach().max()) if dora else 1.0
    gain /= 1 - (layer.dropout if layer.training else 0.0)
    x = x.abs().float() if x.is_floating_point() else x
    plain = type(layer).__mro__[2] if dora else type(layer)  # DoRAConv -> LoRAConv
    sizes.train(layer.training)
    if x.is_floating_point():
        x.requires_grad_()
    torch.manual_seed(5)
    y = plain.forward(sizes, x)
    y.backward(grad_y.abs().float())
    dtype = grad_y.dtype
    found = {"y": y, "lora_A": sizes.lora_A.grad, "lora_B": sizes.lora_B.grad}
    if x.is_floating_point():
        found["x"] = x.grad
    if sizes.lora_bias is not None:
        found["lora_bias"] = sizes.lora_bias.grad
    bias = getattr(sizes.base_layer, "bias", None)
    if bias is not None:
        found["bias"] = bias.grad
    if dora:
        dims = [
            i for i in range(y.dim()) if i != (1 if isinstance(layer, LoRAConv) else y.dim() - 1)
        ]
        per_norm = (y * grad_y.abs()).sum(dim=dims) / layer.weight_norm()
        found["magnitude"] = per_norm.detach()
    result = {}
    for name, size in found.items():
        # Only y and the gradient of x are in the dtype of the activations.
        own = dtype if name in ("y", "x") else torch.float32
        size = size.detach().double()
        result[name] = 4 * depth**0.5 * U * gain * size
        # ... which the operations in between round as well, at most six of them.
        result[name] += 6 * ulp(gain * size, dtype if dtype != torch.float32 else own)
    return result


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that operations make."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.found = max(self.found, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nested", "conv"])
def test_nothing_of_the_weights_size_is_made(
    kind: str, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feinwerk.nn import lora_embedding

    monkeypatch.setattr(lora_embedding, "_SLAB", 1 << 12)
    if kind == "conv":
        layer = make_conv(dora, nn.Conv2d(64, 96, 3), 2)
        x, size = make_x((1, 64, 5, 5), torch.float32), 64 * 96 * 9
    else:
        layer = make_embedding(dora, 1000, 64, 2, kind)
        x, size = torch.arange(10), 1000 * 64
    with Largest(list(layer.parameters()) + list(layer.buffers())) as largest:
        layer(x).sum().backward()
        with torch.no_grad():
            layer.eval()(x)
    # im2col of the convolution is torch's own; A's gradient has A's size.
    assert largest.found <= size // 4


class TestEmbedding:
    @given(
        V=st.integers(1, 40), D=st.integers(1, 40), r=st.integers(1, 48), dora=st.booleans(),
        base=st.sampled_from(["dense", "nf4", "nested"]), dtype=st.sampled_from(DTYPES),
        count=st.integers(0, 9), padding=st.booleans(), scaled=st.booleans(),
    )  # fmt: skip
    def test_outputs_and_gradients(
        self, V: int, D: int, r: int, dora: bool, base: str, dtype: torch.dtype, count: int,
        padding: bool, scaled: bool,
    ) -> None:  # fmt: skip
        options = {"padding_idx": V - 1 if padding else None}
        if base == "dense":
            options["scale_grad_by_freq"] = scaled
        if dora and base != "dense":  # PEFT would take the norm of the table rounded to bf16
            dtype = torch.float32
        layer = make_embedding(dora, V, D, r, base, dtype, **options)
        ids = torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(3))
        grad_y = make_x((count, D), dtype, seed=2)
        compare(layer, ids, grad_y, rounding(layer, ids, grad_y, V + r + count))

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_no_op_at_first_and_any_indices(self, dtype: torch.dtype, dora: bool) -> None:
        table = nn.Embedding(20, 12, dtype=dtype)
        layer: Any = (DoRAEmbedding if dora else LoRAEmbedding)(table, 4, lora_alpha=3)
        for ids in (torch.arange(20).view(2, 2, 5), torch.tensor(3), torch.tensor([1]).int()):
            assert_same_bits(layer(ids).detach(), table(ids))
        assert layer.magnitude.shape == (12,) if dora else True
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (20, 12, None)

    def test_many_slabs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from feinwerk.nn import lora_embedding

        for base in ("dense", "nested"):
            layer = make_embedding(True, 37, 12, 4, base)
            norms = layer._row_norms(), layer.weight_norm()
            with monkeypatch.context() as patch:
                patch.setattr(lora_embedding, "_SLAB", 12 * 5)
                layer.invalidate()
                sliced = layer._row_norms(), layer.weight_norm()
            truth = layer.base_weight
            truth = truth.dequantize() if base == "nested" else truth
            sums = truth.double() + layer.get_delta_weight().double()
            for pair, dense in zip(zip(norms, sliced, strict=True), (truth, sums), strict=True):
                exact = dense.detach().double().norm(dim=0)
                for got in pair:
                    assert ((got - exact).abs() <= 4 * 41**0.5 * U * 4 * exact).all()

    @pytest.mark.parametrize("base", ["dense", "nested"])
    @pytest.mark.parametrize("dora", [False, True])
    def test_merging(self, base: str, dora: bool) -> None:
        layer = make_embedding(dora, 20, 12, 4, base)
        ids = torch.arange(20)
        y, weight = layer(ids).detach(), layer.weight.clone()
        for into in ("base", "dense"):
            report = layer.merge(into)
            error = (layer(ids) - y).abs().max()
            size = 4 * 24**0.5 * U * 4 * y.abs().max()
            exact = base == "dense" or into == "dense"
            assert report.max_error == 0 if exact else report.max_error > 0
            assert error <= report.max_error + size
            layer.unmerge()
            assert_same_bits(layer.weight, weight)
            assert_same_bits(layer(ids).detach(), y)

    def test_rejections(self) -> None:
        with pytest.raises(ValueError, match="LoRAEmbedding: max_norm must be None"):
            LoRAEmbedding(nn.Embedding(5, 3, max_norm=1.0), 2, lora_alpha=1)
        with pytest.raises(ValueError, match="LoRAEmbedding: sparse must be False"):
            LoRAEmbedding(nn.Embedding(5, 3, sparse=True), 2, lora_alpha=1)
        with pytest.raises(TypeError, match=r"be a torch\.nn\.Embedding or NF4Embedding"):
            DoRAEmbedding(nn.Linear(5, 3), 2, lora_alpha=1)
        with pytest.raises(ValueError, match="init must be one of 'default', 'gaussian'"):
            LoRAEmbedding(nn.Embedding(5, 3), 2, lora_alpha=1, init="pissa")
        with pytest.raises(IndexError):
            LoRAEmbedding(nn.Embedding(5, 3), 2, lora_alpha=1)(torch.tensor([5]))


CONVS = {
    "1x1": lambda: nn.Conv2d(5, 7, 1),
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "stride": lambda: nn.Conv2d(5, 7, (3, 2), stride=2, padding=(0, 1), bias=False),
    "same": lambda: nn.Conv2d(5, 7, 3, padding="same"),
    "1d": lambda: nn.Conv1d(5, 7, 3, padding=1),
    "3d": lambda: nn.Conv3d(5, 7, 2),
}


def images(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return make_x((2, 5, *(6,) * {"1d": 1, "3d": 3}.get(kind, 2)), dtype)


class TestConvolution:
    @pytest.mark.parametrize("r", [1, 4, 19])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("kind", CONVS)
    def test_outputs_and_gradients(self, kind: str, dora: bool, dropout: float, r: int) -> None:
        torch.manual_seed(0)
        options = {} if dora or kind == "stride" else {"lora_bias": True}
        layer = make_conv(dora, CONVS[kind](), r, dropout=dropout, use_rslora=r == 4, **options)
        x = images(kind)
        grad_y = make_x(tuple(layer(x).shape), torch.float32, seed=2)
        depth = grad_y[0, 0].numel() * 2 + layer.lora_A[0].numel() + r
        # torch's dropout draws PEFT's mask from the same seed.
        compare(layer, x, grad_y, rounding(layer, x, grad_y, depth), seed=5)

    def test_groups(self) -> None:
        torch.manual_seed(0)
        layer = make_conv(False, nn.Conv2d(6, 8, 3, groups=2), 4)
        assert layer.lora_A.shape == (4, 6, 3, 3)
        assert layer.lora_B.shape == (8, 2, 1, 1)
        x, grad_y = make_x((2, 6, 5, 5), torch.float32), make_x((2, 8, 3, 3), torch.float32, seed=2)
        compare(layer, x, grad_y, rounding(layer, x, grad_y, 18 + 54 + 4))
        for call in (layer.merge, layer.get_delta_weight):
            with pytest.raises(NotImplementedError, match="LoRAConv: groups must be 1 for "):
                call()
        assert not layer.merged

    def test_dilation_merges_to_the_same(self) -> None:
        torch.manual_seed(0)
        layer = make_conv(False, nn.Conv2d(5, 7, 3, dilation=2, padding=2), 4)
        x = images("2d")
        y = layer(x).detach()
        bound = rounding(layer, x, torch.ones_like(y), 49)["y"]
        layer.merge()
        assert ((layer(x) - y).abs() <= bound).all()

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("kind", [k for k in CONVS if k != "stride"])
    def test_merging(self, kind: str, dora: bool) -> None:
        torch.manual_seed(0)
        layer = make_conv(dora, CONVS[kind](), **({} if dora else {"lora_bias": True}))
        x = images(kind)
        y, weight = layer(x).detach(), layer.weight
        bound = rounding(layer, x, torch.ones_like(y), 49)["y"]
        theirs = peft_twin(layer, torch.float32, torch.float32)
        exact = peft_twin(layer, torch.float64, torch.float32)
        theirs.merge()
        exact.merge()
        assert layer.merge().max_error == 0
        assert ((layer(x) - y).abs() <= bound).all()
        peer = (theirs.base_layer.weight.double() - exact.base_layer.weight).abs().max()
        off = (layer.weight - exact.base_layer.weight).abs().max()
        assert off <= 2 * peer + 4 * 49**0.5 * U * exact.base_layer.weight.abs().max()
        layer.unmerge()
        assert layer.weight is weight
        assert_same_bits(layer(x).detach(), y)

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_no_op_at_first(self, dtype: torch.dtype, dora: bool) -> None:
        base = nn.Conv2d(5, 7, 3, dtype=dtype)
        layer: Any = (DoRAConv if dora else LoRAConv)(base, 4, lora_alpha=3)
        x = images("3x3", dtype)
        assert_same_bits(layer(x).detach(), base(x).detach())

    def test_rejections(self) -> None:
        with pytest.raises(ValueError, match="LoRAConv: padding_mode must be 'zeros', got 'refl"):
            LoRAConv(nn.Conv2d(3, 3, 3, padding_mode="reflect"), 2, lora_alpha=1)
        with pytest.raises(ValueError, match=r"DoRAConv: groups must be 1.*, got 3"):
            DoRAConv(nn.Conv2d(3, 3, 3, groups=3), 3, lora_alpha=1)
        with pytest.raises(
            ValueError, match="r must be a multiple of the convolution's groups = 3"
        ):
            LoRAConv(nn.Conv2d(3, 3, 3, groups=3), 2, lora_alpha=1)
        with pytest.raises(
            TypeError, match=r"be a torch\.nn\.Conv1d, Conv2d or Conv3d, got Linear"
        ):
            LoRAConv(nn.Linear(3, 3), 2, lora_alpha=1)
        layer = LoRAConv(nn.Conv2d(3, 3, 3, bias=False), 2, lora_alpha=1, lora_bias=True)
        with pytest.raises(ValueError, match="base_layer must have a bias to merge lora_bias into"):
            layer.merge()
