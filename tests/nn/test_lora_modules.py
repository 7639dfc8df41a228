"""LoRALinear and DoRALinear against PEFT's own layers in fp64 and fp32, and as modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_layers import compare
from torch import nn
from torch.utils.checkpoint import checkpoint

from feinwerk.nn import Adapter, DoRALinear, LoRALinear, NF4Linear
from feinwerk.philox import keep_mask
from feinwerk.testing import DTYPES, WeightCase, assert_same_bits, make_x, ulp
from feinwerk.testing.adapters import Adapter as OpAdapter
from feinwerk.testing.adapters import AdapterCase

transformers = pytest.importorskip("transformers")

BASES = ("dense", "nf4", "nested", "conv1d")


def make_base(
    kind: str, N: int, K: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    torch.manual_seed(N + K)
    if kind == "conv1d":
        base = transformers.pytorch_utils.Conv1D(N, K).to(dtype)
        nn.init.normal_(base.bias)
        return base
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    if kind == "dense":
        return linear
    return NF4Linear.from_linear(linear, double_quant=kind == "nested")


def make(
    dora: bool, base: Any, r: int = 4, *, fill: bool = True, **options: Any
) -> LoRALinear | DoRALinear:
    """An adapter in which everything is random, as after training."""
    torch.manual_seed(1)
    layer = (DoRALinear if dora else LoRALinear)(base, r, **{"lora_alpha": 3.0, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if fill and name == "magnitude":
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif fill:
                nn.init.normal_(parameter, std=0.3)
    return layer


def as_case(
    layer: Any, x: torch.Tensor, grad_y: torch.Tensor, seed: torch.Tensor | None
) -> AdapterCase:
    """The same call as the tests of the ops describe it: it knows the rounding."""
    (weight, absmax, *nested), blocksize = layer._tables()
    N, K = layer.out_features, layer.in_features
    base = weight.detach().contiguous()
    if absmax is not None:
        base = WeightCase(N, K, blocksize, base, absmax, tuple(nested))
    adapter = OpAdapter(
        layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling,
        layer.magnitude.detach() if isinstance(layer, DoRALinear) else None,
    )  # fmt: skip
    bias, lora_bias = layer.bias, layer.lora_bias
    return AdapterCase(
        x, base, (adapter,), grad_y, None if bias is None else bias.detach(),
        None if lora_bias is None else lora_bias.detach(), None,
        layer.dropout if layer.training else 0.0, seed,
    )  # fmt: skip


def check(layer: Any, x: torch.Tensor, grad_y: torch.Tensor) -> None:
    seed = keep = None
    if layer.dropout and layer.training:
        torch.manual_seed(5)
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
        keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], layer.dropout)
    bounds = as_case(layer, x, grad_y, seed).bounds()
    names = {"A0": "lora_A", "B0": "lora_B", "magnitude0": "magnitude"}
    rounding = {names.get(name, name): budget for name, (_, budget) in bounds.items()}
    compare(layer, x, grad_y, rounding, seed=5, keep=keep)


class TestAgainstPeft:
    @given(
        N=st.integers(1, 40), K=st.integers(1, 70), M=st.integers(0, 9), r=st.integers(1, 48),
        base=st.sampled_from(BASES), dora=st.booleans(), bias=st.booleans(),
        lora_bias=st.booleans(), rslora=st.booleans(), dropout=st.sampled_from([0.0, 0.3]),
        dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_outputs_and_gradients(
        self, N: int, K: int, M: int, r: int, base: str, dora: bool, bias: bool, lora_bias: bool,
        rslora: bool, dropout: float, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        # PEFT's DoRA takes the norm of W~ where we take W's; its Conv1D cannot take zero rows.
        if "n" in base and base != "dense" and dora:
            dtype = torch.float32
        if base == "conv1d":
            M, bias = max(M, 1), True
        layer = make(
            dora, make_base(base, N, K, bias=bias, dtype=dtype), r, use_rslora=rslora,
            dropout=dropout, lora_bias=lora_bias and bias and not dora,
        )  # fmt: skip
        check(layer.train(), make_x((M, K), dtype), make_x((M, N), dtype, seed=2))

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("base", BASES)
    def test_eval_has_no_dropout_and_batches_have_any_shape(self, base: str, dora: bool) -> None:
        layer = make(dora, make_base(base, 12, 33), dropout=0.5).eval()
        x, grad_y = make_x((2, 3, 33), torch.float32), make_x((2, 3, 12), torch.float32, seed=2)
        check(layer, x, grad_y)

    @pytest.mark.parametrize("dora", [False, True])
    def test_a_zero_row_of_the_base(self, dora: bool) -> None:
        base = make_base("dense", 6, 10)
        with torch.no_grad():
            base.weight[2] = 0
        check(make(dora, base), make_x((4, 10), torch.float32), make_x((4, 6), torch.float32))

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("dora", [False, True])
    def test_merged_weight_and_delta(self, base: str, dora: bool) -> None:
        from peft_layers import peft_twin

        layer = make(dora, make_base(base, 12, 33))
        exact, theirs = (peft_twin(layer, d, torch.float32) for d in (torch.float64, torch.float32))
        for name in ("delta", "merged"):
            if name == "merged":
                exact.merge(safe_merge=False)
                theirs.merge(safe_merge=False)
            truth, peer = (
                m.get_delta_weight("default") if name == "delta" else m.base_layer.weight
                for m in (exact, theirs)
            )
            got = layer.get_delta_weight() if name == "delta" else layer.merged_weight()
            # The sum of r products, and the gain with its norm.
            size = (layer.lora_B.abs() @ layer.lora_A.abs()).max().item() * abs(layer.scaling)
            slack = 4 * 45**0.5 * 2.0**-24 * (size + truth.abs().max().item())
            assert got.dtype == torch.float32
            worst = (peer.double() - truth).abs().max().item()
            assert (got.double() - truth).abs().max().item() <= 2 * worst + slack


class TestModule:
    @pytest.mark.parametrize("init", ["default", "gaussian"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("base", BASES)
    def test_dora_is_an_exact_no_op_at_first(
        self, base: str, dtype: torch.dtype, init: str
    ) -> None:
        layer = make_base(base, 12, 33, dtype=dtype)
        lora = make(False, copy.deepcopy(layer), fill=False)
        dora = make(True, layer, fill=False, init=init)
        x = make_x((5, 33), dtype)
        for training in (True, False):
            assert_same_bits(dora.train(training)(x).detach(), lora.train(training)(x).detach())
            with torch.no_grad():
                assert_same_bits(dora(x), lora(x).detach())

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("base", BASES)
    def test_copies_and_state(self, base: str, dora: bool) -> None:
        layer = make(dora, make_base(base, 12, 33))
        x = make_x((5, 33), torch.float32)
        y = layer(x).detach()
        assert_same_bits(copy.deepcopy(layer)(x).detach(), y)
        assert_same_bits(pickle.loads(pickle.dumps(layer))(x).detach(), y)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        other = make(dora, make_base(base, 12, 33), fill=False)
        other(x)
        other.load_state_dict(torch.load(buffer))
        assert_same_bits(other(x).detach(), y)
        assert "base_norm" not in layer.state_dict()

    @pytest.mark.parametrize("dora", [False, True])
    def test_checkpointing_draws_the_same_mask(self, dora: bool) -> None:
        layer = make(dora, make_base("nf4", 12, 33), dropout=0.5).train()
        grads = []
        for through in (False, True):
            layer.zero_grad()
            x = make_x((5, 33), torch.float32).requires_grad_()
            torch.manual_seed(3)
            y = checkpoint(layer, x, use_reentrant=False) if through else layer(x)
            y.sum().backward()
            grads.append([y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        for a, b in zip(*grads, strict=True):
            assert_same_bits(a.detach(), b.detach())

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("base", ["dense", "nested"])
    def test_compile(self, base: str, dora: bool) -> None:
        layer = make(dora, make_base(base, 12, 33))
        x = make_x((5, 33), torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for training in (True, False):
            layer.train(training)
            layer.zero_grad()
            y = layer(x)
            y.sum().backward()
            expected = [y.detach(), layer.lora_B.grad.clone()]
            layer.zero_grad()
            y = compiled(x)
            y.sum().backward()
            assert_same_bits(y.detach(), expected[0])
            assert_same_bits(layer.lora_B.grad, expected[1])
        with torch.no_grad():
            assert_same_bits(compiled(x), layer(x))

    @pytest.mark.parametrize("dora", [False, True])
    def test_casts_leave_codes_and_norms_right(self, dora: bool) -> None:
        for base in BASES:
            layer = make(dora, make_base(base, 12, 33))
            layer(make_x((2, 33), torch.float32))
            packed = layer.weight.clone()
            layer.bfloat16()
            assert layer.lora_A.dtype == torch.bfloat16
            if "n" in base and base != "dense" and base != "conv1d":
                assert_same_bits(layer.weight, packed)
            x = make_x((2, 33), torch.bfloat16)
            fresh = copy.deepcopy(layer)
            fresh.invalidate()
            assert_same_bits(layer(x).detach(), fresh(x).detach())

    def test_conv1d_is_not_copied_in_every_call(self) -> None:
        base = make_base("conv1d", 12, 33)
        before = base.weight.detach().clone()
        x = make_x((5, 33), torch.float32)
        y = base(x).detach()
        layer = make(True, base, fill=False)
        assert layer._tables()[0][0].is_contiguous()
        assert_same_bits(layer.weight.detach(), before)
        state = safetensors.torch.load(safetensors.torch.save(layer.state_dict()))
        assert_same_bits(state["base_layer.weight"], before)
        assert isinstance(layer.state_dict(keep_vars=True)["base_layer.weight"], nn.Parameter)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        copied.load_state_dict(state)
        for other in (layer, copied, layer.double().float()):
            assert other._tables()[0][0].is_contiguous()
        size = 4 * 33**0.5 * 2.0**-24 * x.abs() @ before.abs()
        assert ((layer(x) - y).abs() <= 2 * size + ulp(y, torch.float32)).all()

    def test_what_is_trained(self) -> None:
        base = make_base("dense", 12, 33)
        layer = make(False, base, lora_bias=True)
        trained = [name for name, p in layer.named_parameters() if p.requires_grad]
        assert trained == ["lora_A", "lora_B", "lora_bias", "base_layer.bias"]
        assert layer.weight is base.weight
        assert layer.bias is base.bias
        assert (layer.in_features, layer.out_features) == (33, 12)

    def test_scaling_as_a_tensor_and_autocast(self) -> None:
        layer = make(True, make_base("nested", 12, 33))
        x = make_x((5, 33), torch.float32)
        y = layer(x).detach()
        layer.scaling = torch.tensor(float(layer.scaling))
        assert_same_bits(layer(x).detach(), y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(layer(x).detach(), layer(x.bfloat16()).detach())


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "r must be a whole number of at least 1, got 0", {"r": 0}),
        (ValueError, "r must be a whole number of at least 1, got 2.5", {"r": 2.5}),
        (ValueError, "lora_alpha must be finite, got nan", {"lora_alpha": float("nan")}),
        (ValueError, r"dropout must be in \[0, 1\), got 1.0", {"dropout": 1.0}),
        (TypeError, "dtype must be torch.float32", {"dtype": torch.float64}),
        (ValueError, "init must be one of 'default', .*, got 'eva'", {"init": "eva"}),
        (ValueError, "r must be even for .*, got 3", {"init": "orthogonal", "r": 3}),
        (ValueError, "r must be at most 12 for init='pissa', got 13", {"init": "pissa", "r": 13}),
        (ValueError, "lora_alpha must not be 0", {"init": "olora", "lora_alpha": 0.0}),
        (ValueError, "iterations must be at least 1", {"init": "loftq", "iterations": 0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dora", [False, True])
def test_rejections(error: Any, message: str, options: Any, dora: bool) -> None:
    base = make_base("dense", 12, 33)
    weight = base.weight.detach().clone()
    kind = DoRALinear if dora else LoRALinear
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        kind(base, **{"r": 4, "lora_alpha": 8.0, **options})
    assert base.weight.requires_grad
    assert_same_bits(base.weight.detach(), weight)


def test_rejected_bases() -> None:
    class Special(nn.Linear):
        pass

    for base in (Special(3, 3), nn.Embedding(3, 3), LoRALinear(nn.Linear(3, 3), 1, lora_alpha=1)):
        kind = type(base).__name__
        with pytest.raises(
            TypeError, match=f"be a torch.nn.Linear, NF4Linear or Conv1D, got {kind}"
        ):
            LoRALinear(base, 2, lora_alpha=1)
    with pytest.raises(TypeError, match=r"base_layer\.weight must be torch\.float32"):
        LoRALinear(nn.Linear(3, 3).double(), 2, lora_alpha=1)
    with pytest.raises(ValueError, match='base_layer must be dense for init="loftq"'):
        LoRALinear(NF4Linear(64, 8), 2, lora_alpha=1, init="loftq")
    with pytest.raises(ValueError, match="DoRALinear: lora_bias must be False"):
        DoRALinear(nn.Linear(3, 3), 2, lora_alpha=1, lora_bias=True)
    assert issubclass(DoRALinear, Adapter)
