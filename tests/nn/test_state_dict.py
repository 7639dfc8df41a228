"""The state dict of NF4 modules: bitsandbytes' keys, loading in every way, spoiled checkpoints."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from feinwerk.nn import NF4Linear
from feinwerk.testing import assert_same_bits, make_x

NESTED_KEYS = [
    "up.weight", "up.bias", "up.weight.absmax", "up.weight.quant_map", "up.weight.nested_absmax",
    "up.weight.nested_quant_map", "up.weight.quant_state.bitsandbytes__nf4",
]  # fmt: skip
PLAIN_KEYS = [key for key in NESTED_KEYS if "nested" not in key]
X = make_x((3, 33), torch.float32)


class Model(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up


def quantized(double_quant: bool = True, seed: int = 0, blocksize: int = 64) -> Model:
    torch.manual_seed(seed)
    linear = nn.Linear(33, 12)
    return Model(NF4Linear.from_linear(linear, double_quant=double_quant, blocksize=blocksize))


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert_same_bits(states[1][key], value, key)


@pytest.mark.parametrize("double_quant", [False, True])
def test_keys_and_their_order(double_quant: bool) -> None:
    state = quantized(double_quant).state_dict()
    assert list(state) == (NESTED_KEYS if double_quant else PLAIN_KEYS)
    assert state["up.weight"].shape == (198, 1)
    kept = quantized().state_dict(keep_vars=True)
    assert isinstance(kept["up.weight"], nn.Parameter)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["nested", "plain", "blocksize 128", "meta"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_loads_into_any_layer_of_its_size(double_quant: bool, into: str, assign: bool) -> None:
    source = quantized(double_quant)
    if into == "meta":
        with torch.device("meta"):
            target = Model(NF4Linear(33, 12))
        if not assign:
            with pytest.raises(RuntimeError, match=r"up\.weight must be loaded into real memory"):
                target.load_state_dict(source.state_dict())
            return
    else:
        blocksize = 128 if "128" in into else 64
        target = quantized(into != "plain", seed=1, blocksize=blocksize)
    parameter = target.up.weight
    state = safetensors.torch.load(safetensors.torch.save(source.state_dict()))
    result = target.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(target, source)
    assert_same_bits(target.up(X).detach(), source.up(X).detach())
    assert (target.up.weight is parameter) == (not assign)
    assert not target.up.weight.requires_grad


def test_copying_does_not_alias_the_checkpoint() -> None:
    for double_quant in (False, True):
        source, target = quantized(double_quant), quantized(seed=1)
        state = source.state_dict()
        target.load_state_dict(state)
        for value in state.values():
            if value.dtype != torch.uint8 or value.numel() == 198:
                value.zero_()
        assert_same_bits(target.up.dequantize(), quantized(double_quant).up.dequantize())


def test_dtype_comes_from_the_checkpoint() -> None:
    source, target = quantized(), quantized(seed=1)
    source.half()
    target.bfloat16().load_state_dict(source.state_dict())
    assert target.up.dtype == torch.float16
    assert target.up.bias.dtype == torch.bfloat16  # a parameter, kept as torch keeps it


def test_missing_and_unexpected_keys_are_reported_as_torch_does() -> None:
    target = quantized()
    result = target.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(NESTED_KEYS)
    assert_same_state(target, quantized())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"up\.weight\.absmax"'):
        target.load_state_dict({})
    state = {**quantized().state_dict(), "up.other": X, "down.weight": X}
    result = target.load_state_dict(state, strict=False)
    assert sorted(result.unexpected_keys) == ["down.weight", "up.other"]
    without_bias = Model(NF4Linear(33, 12, bias=False))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "up\.bias"'):
        without_bias.load_state_dict(quantized().state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", [key for key in NESTED_KEYS if key != "up.bias"])
def test_a_spoiled_checkpoint_changes_nothing(key: str, strict: bool) -> None:
    target, source = quantized(), quantized(seed=1)
    for spoil in ("remove", "truncate", "retype"):
        state = source.state_dict()
        if spoil == "remove":
            del state[key]
        elif spoil == "truncate":
            state[key] = state[key][:-1]
        else:
            state[key] = state[key].to(torch.int16)
        before = {
            name: value.clone() for name, value in target.state_dict().items() if "bias" not in name
        }
        with pytest.raises(RuntimeError, match=r"up\.weight.* must "):
            target.load_state_dict(state, strict=strict)
        after = target.state_dict()
        for name, value in before.items():
            assert_same_bits(after[name], value, name)


def test_other_shapes_and_dense_weights_are_refused() -> None:
    target = quantized()
    transposed = Model(NF4Linear(12, 33, bias=False)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"up\.weight must have shape \(12, 33\), got \(33, 12\)"
    ):
        target.load_state_dict(transposed, strict=False)
    dense = Model(nn.Linear(33, 12)).state_dict()
    with pytest.raises(RuntimeError, match=r"up\.weight must hold NF4 codes .* got a dense"):
        target.load_state_dict(dense)


def test_meta_modules_list_their_keys() -> None:
    with torch.device("meta"):
        state = Model(NF4Linear(33, 12)).state_dict()
    assert list(state) == NESTED_KEYS
