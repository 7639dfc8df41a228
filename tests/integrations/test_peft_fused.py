"""Fused PEFT layers against PEFT's own, in fp32 and fp64: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from feinwerk import explain
from feinwerk.testing import assert_same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
cases = pytest.importorskip("peft_cases")

BASES, METHODS = cases.BASES, cases.METHODS

X = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2))


def compare(stock: Any, x: torch.Tensor = X, **kwargs: Any) -> dict[str, torch.Tensor]:
    ours = cases.run(cases.fused(stock), x, **kwargs)
    theirs, double = cases.run(stock, x, **kwargs), cases.in_double(stock)
    cases.assert_like_peft(ours, theirs, double, x, x.dtype, **kwargs)
    return ours


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up": 1}, "alpha_pattern": {"down": 17}},
    "rank above the sizes": {"r": 133},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "no bias": {"sizes": {"bias": False}},
    "modules_to_save": {"modules_to_save": ["head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients(base: str, method: str, options: dict[str, Any]) -> None:
    results = compare(cases.make(base, method, **options))
    assert any("lora_A" in name for name in results)
    assert (method == "dora") == any("magnitude" in name for name in results)


@pytest.mark.parametrize("base", BASES)
def test_lora_bias(base: str) -> None:
    results = compare(cases.make(base, lora_bias=True))
    assert any(name.endswith("lora_B.default.bias") for name in results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"compress_statistics": False},
        {"blocksize": 128},
        {"quant_storage": torch.bfloat16},
        {"quant_storage": torch.float32, "compute_dtype": torch.bfloat16},
    ],
    ids=lambda o: next(iter(o)),
)
def test_bitsandbytes_formats(options: dict[str, Any], method: str) -> None:
    base = cases.make_base("dense")
    cases.to_bitsandbytes(base, **options)
    stock = peft.get_peft_model(base, cases.config_of(method))
    cases.randomize(stock)
    ours = cases.fused(stock)
    assert [row.path for row in explain(ours).rows] == ["fused", "fused", "dense"]
    compare(stock)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parts(method: str, frozen: str) -> None:
    stock = cases.make("nf4", method)
    for name, p in stock.named_parameters():
        if frozen in name:
            p.requires_grad_(False)
    results = compare(stock)
    assert not any(frozen in name for name in results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_scaling_as_a_tensor(base: str, method: str) -> None:
    stock = cases.make(base, method)
    for layer in stock.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    compare(stock)


@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_dropout_is_pefts_formula_with_our_mask(base: str, method: str, p: float) -> None:
    stock = cases.make(base, method, lora_dropout=p)
    ours = cases.fused(stock)
    truth = cases.in_double(stock)
    for model in (stock, truth):
        cases.inject_masks(model, X, seed=11, p=p)
    torch.manual_seed(11)
    got = cases.run(ours, X)
    cases.assert_like_peft(got, cases.run(stock, X), truth, X)
    torch.manual_seed(11)
    assert_same_bits(cases.run(ours, X)["y"], got["y"])
    assert not torch.equal(cases.run(ours, X)["y"], got["y"])
    ours.eval()
    assert_same_bits(cases.run(ours, X)["y"], cases.run(ours, X)["y"])


@given(
    width=st.integers(1, 40), inner=st.integers(1, 40), r=st.integers(1, 50),
    rows=st.integers(0, 9), method=st.sampled_from(METHODS), base=st.sampled_from(BASES),
)  # fmt: skip
def test_any_shape_and_rank(
    width: int, inner: int, r: int, rows: int, method: str, base: str
) -> None:
    # The gradient of a magnitude comes from the saved y less the bias: a bias many times the rest
    # costs it digits, which the tests of dora_linear account for.
    sizes = {"width": width, "inner": inner, "bias": method == "lora"}
    stock = cases.make(base, method, sizes=sizes, r=r)
    assume(base != "bnb" or cases.bitsandbytes_is_exact(stock))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    ours, theirs = cases.run(cases.fused(stock), x), cases.run(stock, x)
    cases.assert_like_peft(ours, theirs, cases.in_double(stock), x)


@pytest.mark.parametrize("dims", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_any_dimension(method: str, dims: int) -> None:
    x = {1: X[0, 0], 2: X[0], 4: X[None]}[dims]
    stock = cases.make("nf4", method)
    if (dims, method) == (1, "dora"):  # PEFT makes this one a matrix; a layer gives [N] for [K]
        assert cases.run(cases.fused(stock), x)["y"].shape == (5,)
        return
    compare(stock, x)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", BASES)
def test_several_active_adapters(base: str, p: float) -> None:
    stock = cases.make(base, lora_bias=base == "dense")
    stock.add_adapter("other", cases.config_of(r=5, lora_alpha=2, use_rslora=True, lora_dropout=p))
    cases.randomize(stock, seed=4)
    stock.base_model.set_adapter(["default", "other"])
    if p:
        ours = cases.fused(stock)
        layer = ours.base_model.model.up
        assert layer.route().op == ""  # a mask of its own for each: PEFT's code
        torch.manual_seed(3)
        a = cases.run(ours, X)
        torch.manual_seed(3)
        assert_same_bits(a["y"], cases.run(stock, X)["y"])
        stock.eval()
    results = compare(stock)
    assert all(any(f"lora_B.{n}" in key for key in results) for n in ("default", "other"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_autocast(base: str, method: str) -> None:
    stock = cases.make(base, method)
    ours = cases.fused(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, theirs = cases.run(ours, X), cases.run(stock, X)
    cases.assert_like_peft(got, theirs, cases.in_double(stock), X, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_half_precision_models_with_fp32_adapters(
    base: str, method: str, dtype: torch.dtype
) -> None:
    stock = cases.make(base, method)
    for name, child in stock.base_model.model.named_children():
        (child if name == "head" else child.base_layer).to(dtype)
    compare(stock, X.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_fp64_runs_pefts_own_code(method: str) -> None:
    stock = cases.make("dense", method).double()
    ours = cases.fused(stock)
    a, b = cases.run(ours, X), cases.run(stock, X)
    for name, value in b.items():
        assert_same_bits(a[name], value, name)
    assert ours.base_model.model.up.route().op == ""


@pytest.mark.parametrize("base", BASES)
def test_dora_is_exactly_the_base_at_initialization(base: str) -> None:
    both = []
    for method in METHODS:
        torch.manual_seed(5)
        model = peft.get_peft_model(cases.make_base(base), cases.config_of(method))
        both.append(cases.fused(model))
    lora, dora = both
    for dtype in (torch.float32, torch.bfloat16):
        for name, layer in (("up", lora), ("down", lora)):
            x = torch.randn(9, getattr(layer.base_model.model, name).in_features).to(dtype)
            if base == "dense" and dtype is not torch.float32:
                continue  # the base itself refuses it
            a = getattr(lora.base_model.model, name)(x)
            b = getattr(dora.base_model.model, name)(x)
            assert_same_bits(b, a)
            with torch.no_grad():
                dora.eval()
                assert_same_bits(getattr(dora.base_model.model, name)(x), a)
                dora.train()


def test_a_zero_row_of_the_base_gives_no_nan() -> None:
    stock = cases.make("dense", "dora")
    with torch.no_grad():
        stock.base_model.model.up.base_layer.weight[3] = 0
        stock.base_model.model.up.lora_B["default"].weight[3] = 0
    results = cases.run(cases.fused(stock), X)
    assert all(value.isfinite().all() for value in results.values() if value is not None)
