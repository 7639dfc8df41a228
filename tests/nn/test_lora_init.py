"""The inits of A and B against PEFT's own on the same base, and what each of them promises."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_lora_modules import make_base
from torch import nn

from feinwerk import NF4Weight
from feinwerk.codebook import nf4_codebook
from feinwerk.nn import DoRALinear, LoRAConv, LoRAEmbedding, LoRALinear, NF4Linear, loftq
from feinwerk.testing import assert_same_bits, make_x

peft = pytest.importorskip("peft")

N, K, R = 24, 33, 4
TAKING = ("pissa", "pissa_niter_4", "olora")


def their_layer(base: Any, init: Any, *, alpha: float = 6.0, r: int = R, **options: Any) -> Any:
    module = peft.tuners.lora.layer
    conv1d = type(base).__name__ == "Conv1D"
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, init_lora_weights=init, fan_in_fan_out=conv1d, **options
    )
    kinds = {nn.Embedding: module.Embedding, nn.Conv2d: module.Conv2d}
    kind = kinds.get(type(base), module.Linear)
    return kind(base, "default", config, r=r, lora_alpha=alpha)


def product_error(layer: LoRALinear) -> float:
    """What rounding does to s B A and to a sum with it: r products, each of size |s| |B| |A|."""
    sizes = abs(float(layer.scaling)) * (layer.lora_B.detach().abs() @ layer.lora_A.detach().abs())
    return 4 * math.sqrt(R) * 2.0**-24 * float(sizes.max())


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("base", ["dense", "nf4", "conv1d"])
def test_random_inits_draw_what_peft_draws(init: str, base: str) -> None:
    layer = make_base(base, N, K)
    before = layer.state_dict()
    dense = layer.to_linear() if base == "nf4" else copy.deepcopy(layer)
    theirs = their_layer(dense, True)
    torch.manual_seed(7)
    if init == "orthogonal":
        theirs.orthogonal_init("default")
    else:
        theirs.reset_lora_parameters("default", True if init == "default" else init)
    torch.manual_seed(7)
    ours = LoRALinear(layer, R, lora_alpha=6, init=init)
    assert_same_bits(ours.lora_A.detach(), theirs.lora_A["default"].weight.detach())
    assert_same_bits(ours.lora_B.detach(), theirs.lora_B["default"].weight.detach())
    assert ours.get_delta_weight().abs().max() <= product_error(ours)
    assert ours.initial_A is None
    for key, value in ours.base_layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_convolutions_and_embeddings(init: str) -> None:
    peft_init = True if init == "default" else init
    torch.manual_seed(0)
    conv, table = nn.Conv2d(3, 8, 3), nn.Embedding(20, 12)
    theirs = [their_layer(copy.deepcopy(base), peft_init) for base in (conv, table)]
    ours: list[Any] = []
    for layer, base, kind in zip(theirs, (conv, table), (LoRAConv, LoRAEmbedding), strict=True):
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", peft_init)
        torch.manual_seed(7)
        ours.append(kind(base, R, lora_alpha=6, init=init))
    assert_same_bits(ours[0].lora_A.detach(), theirs[0].lora_A["default"].weight.detach())
    assert_same_bits(ours[1].lora_B.detach(), theirs[1].lora_embedding_B["default"].detach())
    assert not ours[0].lora_B.any()
    assert not ours[1].lora_A.any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", TAKING)
@pytest.mark.parametrize("base", ["dense", "conv1d"])
def test_what_is_taken_out_of_a_dense_base(base: str, init: str, rslora: bool) -> None:
    layer = make_base(base, N, K)
    before = layer.weight.detach().clone()
    torch.manual_seed(7)
    ours = LoRALinear(copy.deepcopy(layer), R, lora_alpha=6, init=init, use_rslora=rslora)
    assert ours.scaling == (3.0 if rslora else 1.5)
    # The rest and s B A make W again, up to one rounding of the rest and the product's.
    slack = product_error(ours) + 2.0**-24 * float(before.abs().max())
    assert (ours.merged_weight() - before).abs().max() <= 2 * slack
    assert_same_bits(ours.initial_A, ours.lora_A.detach())
    assert_same_bits(ours.initial_B, ours.lora_B.detach())
    delta, W = ours.get_delta_weight(), before
    if base == "conv1d":
        delta, W = delta.t(), W.t()
    if init == "olora":
        Q, upper = torch.linalg.qr(W.double())
        truth = ours.scaling * Q[:, :R] @ upper[:R]
    else:
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        truth = U[:, :R] * S[:R] @ Vh[:R]
        balance = ours.lora_A.norm(dim=1) - ours.lora_B.norm(dim=0)
        assert balance.abs().max() <= 2.0**-18 * ours.lora_B.norm(dim=0).max()
    if base == "conv1d" and init == "olora":
        return  # PEFT's takes the transposed weight there
    theirs = their_layer(copy.deepcopy(layer), "niter" in init or init, use_rslora=rslora)
    if "niter" in init:  # a randomized fit: the same one for the same random numbers
        torch.manual_seed(7)
        theirs.pissa_init("default", init)
        truth = theirs.get_delta_weight("default").double()
        truth = truth.t() if base == "conv1d" else truth
    peer = theirs.get_delta_weight("default").double()
    peer_error = float(((peer.t() if base == "conv1d" else peer) - truth).abs().max())
    assert (delta - truth).abs().max() <= 2 * peer_error + product_error(ours)
    rest = theirs.base_layer.weight
    assert (ours.weight - rest).abs().max() <= 2 * peer_error + 2 * slack


@pytest.mark.parametrize("init", TAKING)
def test_over_nf4_the_rest_is_quantized_again(init: str) -> None:
    layer = make_base("nf4", N, K)
    bias, before = layer.bias, layer.dequantize()
    ours = LoRALinear(layer, R, lora_alpha=6, init=init)
    assert ours.base_layer is layer
    assert layer.bias is bias
    rest = (before - ours.get_delta_weight()).reshape(-1)
    # Every element goes to the nearest of 16 values: half the widest gap, times its block's absmax.
    gap = float(nf4_codebook().diff().max()) / 2
    blocks = nn.functional.pad(rest.abs(), (0, -len(rest) % 64)).view(-1, 64).amax(dim=1)
    bound = gap * blocks.repeat_interleave(64)[: len(rest)] + 2 * product_error(ours)
    error = (ours.merged_weight() - before).reshape(-1).abs()
    assert (error <= bound).all()
    assert error.max() > 0.25 * bound.max()  # it is quantized, not kept aside


def test_a_tied_weight_keeps_its_values() -> None:
    layer, other = nn.Linear(K, N), nn.Linear(K, N)
    other.weight = layer.weight
    before = layer.weight.detach().clone()
    ours = LoRALinear(layer, R, lora_alpha=6, init="pissa")
    assert_same_bits(other.weight.detach(), before)
    assert ours.weight is not other.weight


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "orthogonal"])
def test_dora_starts_at_gain_one(init: str) -> None:
    layer = make_base("dense", N, K)
    x = make_x((5, K), torch.float32)
    dora = DoRALinear(copy.deepcopy(layer), R, lora_alpha=6, init=init)
    lora = LoRALinear(dora.base_layer, R, lora_alpha=6)
    for name in ("lora_A", "lora_B"):
        getattr(lora, name).data = getattr(dora, name).data
    assert_same_bits(dora.magnitude.detach(), dora.weight_norm())
    y, plain = dora(x).detach(), lora(x).detach()
    # The op's own norm may differ in its last bits.
    assert (y - plain).abs().max() <= 8 * math.sqrt(K) * 2.0**-24 * plain.abs().max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_bf16_adapters_lose_nothing_of_w(init: str) -> None:
    layer = make_base("dense", N, K)
    before = layer.weight.detach().clone()
    ours = LoRALinear(layer, R, lora_alpha=6, init=init, dtype=torch.bfloat16)
    assert ours.lora_A.dtype == torch.bfloat16
    slack = product_error(ours) + 2.0**-24 * float(before.abs().max())
    assert (ours.merged_weight() - before).abs().max() <= 2 * slack


class TestLoftQ:
    def theirs(self, W: torch.Tensor, iterations: int) -> tuple[torch.Tensor, ...]:
        """PEFT's loop (which runs on GPUs only) with its own SVD and bitsandbytes' quantizer."""
        functional = pytest.importorskip("bitsandbytes").functional
        from peft.utils.loftq_utils import _low_rank_decomposition

        rest = W.clone()
        for _ in range(iterations):
            codes, state = functional.quantize_4bit(rest, quant_type="nf4", blocksize=64)
            dense = functional.dequantize_4bit(codes, state)
            parts = _low_rank_decomposition(W - dense, reduced_rank=R)
            rest = W - parts["L"] @ parts["R"]
        return codes, dense, parts["R"], parts["L"]

    @pytest.mark.parametrize("iterations", [1, 2, 5])
    def test_equals_peft(self, iterations: int) -> None:
        W = make_x((N, 64), torch.float32)
        codes, dense, A, B = self.theirs(W, iterations)
        Q, ours_A, ours_B = loftq(W, R, iterations=iterations, double_quant=False)
        assert_same_bits(Q.packed.reshape(-1), codes.reshape(-1))
        assert_same_bits(Q.dequantize(), dense)
        size = 4 * math.sqrt(R) * 2.0**-24 * float((B.abs() @ A.abs()).max())
        assert (ours_B @ ours_A - B @ A).abs().max() <= 8 * size

    @pytest.mark.parametrize("alpha", [6.0, -6.0, 4.0])
    @pytest.mark.parametrize("base", ["dense", "conv1d"])
    def test_as_an_init(self, base: str, alpha: float) -> None:
        layer = make_base(base, N, K)
        W = layer.weight.detach().clone()
        W = W.t() if base == "conv1d" else W
        bias, plain = layer.bias, NF4Linear.from_linear(nn.Linear(K, N))
        ours = LoRALinear(layer, R, lora_alpha=alpha, init="loftq", iterations=3)
        Q, A, B = loftq(W, R, scaling=alpha / R, iterations=3)
        assert isinstance(ours.base_layer, NF4Linear)
        assert ours.bias is bias
        assert_same_bits(ours.weight.reshape(-1), Q.packed.reshape(-1))
        assert_same_bits(ours.lora_A.detach(), A)
        assert_same_bits(ours.lora_B.detach(), B)
        lost = float(torch.linalg.norm(NF4Weight.from_dense(W).dequantize() - W))
        left = float(torch.linalg.norm(ours.merged_weight() - W))
        assert left < 0.9 * lost
        assert ours(make_x((2, K), torch.float32)).shape == plain(torch.zeros(2, K)).shape

    def test_rejections(self) -> None:
        W = torch.ones(4, 64)
        with pytest.raises(ValueError, match=r"loftq: r must be in \[1, 4\], got 5"):
            loftq(W, 5)
        with pytest.raises(ValueError, match="loftq: iterations must be at least 1, got 0"):
            loftq(W, 2, iterations=0)
        with pytest.raises(ValueError, match=r"loftq: weight must have shape \(N, K\)"):
            loftq(torch.ones(64), 1)
        with pytest.raises(TypeError, match=r"loftq: weight must be torch\.float32"):
            loftq(W.double(), 1)
