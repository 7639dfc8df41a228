"""bitsandbytes and Feinwerk read and write each other's NF4 layers, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import NF4Weight, quantize_model
from feinwerk.nn import NF4Linear
from feinwerk.testing import DTYPES, assert_same_bits

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(7, 13), (64, 256), (65, 97), (256, 1024), (1, 1), (512, 96)]


def their_layer(
    linear: nn.Linear, *, double_quant: bool = True, blocksize: int = 64, quant_type: str = "nf4"
) -> Any:
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compress_statistics=double_quant, quant_type=quant_type,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, compress_statistics=double_quant,
        quant_type=quant_type, blocksize=blocksize, module=layer,
    )  # fmt: skip
    layer.bias = linear.bias
    return layer.to("cpu")  # quantizes


def make(N: int, K: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(N + K)
    return nn.Linear(K, N, dtype=dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_state_dicts_are_equal_byte_for_byte(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    linear = make(*shape, dtype)
    for blocksize in (64, 128, 4096):
        theirs = their_layer(linear, double_quant=double_quant, blocksize=blocksize).state_dict()
        layer = NF4Linear.from_linear(linear, double_quant=double_quant, blocksize=blocksize)
        ours = layer.state_dict()
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same_bits(ours[key], value, key)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_we_read_theirs(shape: tuple[int, int], double_quant: bool) -> None:
    linear = make(*shape, torch.bfloat16)
    theirs = their_layer(linear, double_quant=double_quant)
    layer = NF4Linear(shape[1], shape[0], dtype=torch.bfloat16)
    layer.load_state_dict(theirs.state_dict())
    state = theirs.weight.quant_state
    expected = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if (
        state.nested
    ) else state.absmax  # fmt: skip
    codes = torch.stack([layer.weight.view(-1) >> 4, layer.weight.view(-1) & 15], dim=1)
    values = state.code[codes.view(-1).long()][: linear.weight.numel()]
    dense = values * expected.repeat_interleave(64)[: linear.weight.numel()]
    assert_same_bits(layer.dequantize(torch.float32), dense.view(shape))
    for key, value in theirs.state_dict().items():
        assert_same_bits(layer.state_dict()[key], value, key)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_they_read_ours(double_quant: bool) -> None:
    linear = make(64, 256, torch.float32)
    layer = NF4Linear.from_linear(linear, double_quant=double_quant)
    state = layer.state_dict()
    stats = {key[len("weight.") :]: v for key, v in state.items() if key.startswith("weight.")}
    read = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    dense = bnb.functional.dequantize_4bit(read.data, read.quant_state)
    assert_same_bits(layer.dequantize(), dense)
    theirs = {"weight": read.data, **{
        f"weight.{key}": value for key, value in read.quant_state.as_dict(packed=True).items()
    }}  # fmt: skip
    for key, value in theirs.items():
        assert_same_bits(state[key], value, key)


def test_their_offset_gives_their_bytes_for_any_number_of_threads() -> None:
    torch.set_num_threads(2)
    linear = make(512, 1536, torch.float32)
    theirs = their_layer(linear)
    offset = theirs.weight.quant_state.offset
    ours = NF4Weight.from_dense(linear.weight, nested_offset=offset).to_bitsandbytes()
    for key, value in theirs.state_dict().items():
        if key != "bias":
            assert_same_bits(ours[key], value, key)


def test_fp4_is_refused() -> None:
    state = their_layer(make(8, 64, torch.float32), quant_type="fp4").state_dict()
    with pytest.raises(ValueError, match=r"bitsandbytes__fp4 must not be present"):
        NF4Weight.from_bitsandbytes(state)


def test_a_whole_model_changes_hands() -> None:
    # K is a multiple of the blocksize: for others 0.50.2 reads the wrong absmax on AVX-512.
    model = nn.Sequential(make(128, 64, torch.float32), nn.ReLU(), make(33, 128, torch.float32))
    theirs = nn.Sequential(their_layer(model[0]), nn.ReLU(), their_layer(model[2]))
    quantize_model(model)
    for key, value in theirs.state_dict().items():
        assert_same_bits(model.state_dict()[key], value, key)
    with torch.device("meta"):
        empty = nn.Sequential(NF4Linear(64, 128), nn.ReLU(), NF4Linear(128, 33))
    empty.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(5, 64)
    assert_same_bits(empty(x).detach(), model(x).detach())
    # Theirs multiplies the same weights, with another order of summation.
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
