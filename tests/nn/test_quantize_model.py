"""quantize_model: what is replaced, what is left and why, ties, atomic refusals, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import feinwerk
from feinwerk import NF4Weight, quantize_model
from feinwerk.nn import NF4Embedding, NF4Linear, dequantize_model
from feinwerk.testing import assert_same_bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(33, 70), nn.Linear(70, 33, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 33)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(33)
        self.lm_head = nn.Linear(33, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


LINEARS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
TOKENS = torch.arange(20).view(2, 10)


def make(tied: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(tied)


def nf4_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]


class TestWhatIsReplaced:
    def test_every_linear_but_the_head(self) -> None:
        model, source = make().eval(), make()
        seen: list[Any] = []
        report = quantize_model(model, progress=lambda *args: seen.append(args))
        assert nf4_names(model) == LINEARS
        assert seen == [(i + 1, 4, name) for i, name in enumerate(LINEARS)]
        for name in LINEARS:
            layer = model.get_submodule(name)
            expected = NF4Weight.from_dense(source.get_submodule(name).weight)
            assert_same_bits(layer.dequantize(), expected.dequantize(), name)
            assert not layer.training
        assert report.skipped == {
            "embed": "Embedding: quantized only with embeddings=True",
            "lm_head": "in skip",
        }
        assert model(TOKENS).shape == (2, 10, 20)

    def test_report_counts_bytes(self) -> None:
        model = make()
        report = quantize_model(model)
        rest = 4 * (20 * 33 * 2 + 33 * 2 + 70 * 2)
        assert report.bytes_before == rest + 4 * (33 * 70 * 4)
        layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
        assert report.bytes_after == rest + sum(layer.nf4_weight.nbytes for layer in layers)
        assert [layer.shape for layer in report.layers] == [(70, 33), (33, 70)] * 2
        assert report.layers[0].bytes_before == 4 * 33 * 70
        assert report.layers[0].bytes_after == layers[0].nf4_weight.nbytes
        assert str(report).startswith("4 weights in NF4, model 0.0 MiB -> 0.0 MiB\n  left dense: ")

    @pytest.mark.parametrize(
        ("skip", "left"),
        [
            ((), []),
            (("lm_head", "layers.0"), ["lm_head", *LINEARS[:2]]),
            (("up",), ["layers.0.up", "layers.1.up"]),
            (("*.1.d*",), ["layers.1.down"]),
            (["layers.1.up"], ["layers.1.up"]),
            (("head", "layer", "own"), []),
        ],
    )
    def test_skip(self, skip: Any, left: list[str]) -> None:
        model = make()
        report = quantize_model(model, skip=skip)
        dense = [name for name, m in model.named_modules() if type(m) is nn.Linear]
        assert sorted(dense) == sorted(left)
        assert {name for name, why in report.skipped.items() if why == "in skip"} == set(left)

    def test_skip_entries_that_match_nothing_are_reported(self) -> None:
        report = quantize_model(make(), skip=("lm_head", "lm_haed"))
        assert report.unused_skips == ["lm_haed"]
        assert "skip entry matched nothing: lm_haed" in str(report)

    def test_options_reach_the_layers(self) -> None:
        model = make().bfloat16()
        quantize_model(model, skip=(), double_quant=False, blocksize=128, embeddings=True)
        assert isinstance(model.embed, NF4Embedding)
        for layer in (model.embed, model.lm_head):
            assert (layer.double_quant, layer.blocksize, layer.dtype) == (
                False, 128, torch.bfloat16,
            )  # fmt: skip
        cuda, cpu = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        for model_, rule in ((cuda, "cuda"), (cpu, "cpu")):
            nn.init.zeros_(model_[0].weight)
            quantize_model(model_, rule=rule)
        assert (cuda[0].weight[0].item(), cpu[0].weight[0].item()) == (0x00, 0x77)

    def test_everything_else_is_named_with_its_reason(self) -> None:
        class MyLinear(nn.Linear):
            pass

        class Conv1D(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 24))

        model = nn.ModuleDict(
            {
                "mine": MyLinear(8, 8),
                "conv1d": Conv1D(),
                "conv": nn.Conv2d(2, 2, 3),
                "attention": nn.MultiheadAttention(8, 2),
                "encoder": nn.TransformerEncoderLayer(8, 2, 16),
                "hooked": nn.Linear(8, 8),
                "norm_table": nn.Embedding(4, 8, max_norm=1.0),
                "plain": nn.Linear(8, 8),
            }
        )
        model.experts = nn.Parameter(torch.randn(2, 3, 4))
        model["hooked"].register_forward_hook(lambda *_: None)
        report = quantize_model(model, embeddings=True)
        assert [layer.name for layer in report.layers] == ["plain"]
        expected = {
            "mine": "MyLinear is a subclass of torch.nn.Linear",
            "conv1d": "Conv1D holds its weight as [in, out]",
            "conv": "Conv2d is no Linear",
            "attention.in_proj_weight": "MultiheadAttention.in_proj_weight: only Linear",
            "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass",
            "encoder.linear1": "torch.nn.TransformerEncoderLayer reads this weight",
            "hooked": "it has hooks or a replaced forward",
            "norm_table": "Embedding with max_norm",
            "experts": "a parameter of the model itself",
        }
        for name, reason in expected.items():
            assert report.skipped[name].startswith(reason), name

    def test_a_second_run_finds_nothing(self) -> None:
        model = make()
        quantize_model(model, skip=())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert not quantize_model(model, skip=()).layers
        for key, value in model.state_dict().items():
            assert_same_bits(value, before[key], key)

    def test_notes_of_other_libraries_stay_on_the_layer(self) -> None:
        model = make()
        model.layers[0].up._is_hf_initialized = True
        quantize_model(model)
        assert model.layers[0].up._is_hf_initialized is True


class TestTies:
    def test_tied_linears_are_quantized_once_and_stay_tied(self) -> None:
        model = make()
        model.layers[1].up.weight = model.layers[0].up.weight
        report = quantize_model(model)
        assert [layer.name for layer in report.layers] == LINEARS[:2] + LINEARS[3:]
        first, second = model.layers[0].up, model.layers[1].up
        assert first.weight is second.weight
        assert first.absmax is second.absmax
        assert first is not second
        assert first.bias is not second.bias
        model.half()
        assert first.weight is second.weight

    def test_one_module_in_two_places_stays_one(self) -> None:
        model = make()
        model.layers[1].down = model.layers[0].down
        model.again = model.layers[1]
        quantize_model(model)
        assert model.layers[1].down is model.layers[0].down
        assert model.again.down is model.layers[0].down
        assert isinstance(model.again.up, NF4Linear)

    def test_a_head_tied_to_a_dense_embedding_stays_dense(self) -> None:
        model = make(tied=True)
        report = quantize_model(model, skip=())
        assert report.skipped["lm_head"] == "tied to embed, which stays dense"
        assert model.lm_head.weight is model.embed.weight

    def test_head_and_embedding_are_quantized_together(self) -> None:
        model, source = make(tied=True), make(tied=True)
        report = quantize_model(model, skip=(), embeddings=True)
        assert [layer.name for layer in report.layers] == ["embed", *LINEARS]
        assert model.embed.weight is model.lm_head.weight
        assert isinstance(model.lm_head, NF4Linear)
        expected = NF4Weight.from_dense(source.embed.weight).dequantize()
        assert_same_bits(model.embed(TOKENS), expected[TOKENS])
        names = dequantize_model(model)
        assert sorted(names) == sorted(["embed", "lm_head", *LINEARS])
        assert model.embed.weight is model.lm_head.weight
        assert_same_bits(model.embed.weight.detach(), expected)
        assert not nf4_names(model)

    def test_a_skipped_partner_keeps_both_dense(self) -> None:
        model = make()
        model.layers[1].up.weight = model.layers[0].up.weight
        report = quantize_model(model, skip=("layers.0",))
        assert report.skipped["layers.1.up"] == "tied to layers.0.up, which stays dense"
        assert nf4_names(model) == ["layers.1.down", "lm_head"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"skip": "lm_head"}, TypeError, "skip must be a tuple or list of names"),
            ({"progress": True}, TypeError, "progress must be a callable or None, got bool"),
            ({"blocksize": 100}, ValueError, "blocksize must be one of"),
            ({"rule": "gpu"}, ValueError, "rule must be"),
        ],
    )
    def test_arguments(self, kwargs: Any, error: type[Exception], message: str) -> None:
        model = make()
        with pytest.raises(error, match=message):
            quantize_model(model, **kwargs)
        assert not nf4_names(model)

    def test_a_bare_layer(self) -> None:
        with pytest.raises(ValueError, match=r"model must contain .* NF4Linear\.from_linear"):
            quantize_model(nn.Linear(3, 3))

    def test_bad_weights_are_found_before_anything_changes(self) -> None:
        for spoil, error, message in [
            (lambda m: m.double(), TypeError, "layers.1.down.weight must be torch.float32"),
            (
                lambda m: setattr(m, "weight", nn.Parameter(torch.empty(0, 33))),
                ValueError,
                "layers.1.down.weight must have elements",
            ),
        ]:
            model = make()
            spoil(model.layers[1].down)
            with pytest.raises(error, match=message):
                quantize_model(model)
            assert not nf4_names(model)
            assert quantize_model(model, skip=("layers.1.down",)).layers

    def test_a_weight_that_is_not_finite_is_named(self) -> None:
        model = make()
        with torch.no_grad():
            model.layers[1].up.weight[3, 4] = torch.nan
        with pytest.raises(ValueError, match=r"layers\.1\.up\.weight: .* must be finite"):
            quantize_model(model)
        assert nf4_names(model) == LINEARS[:2]
        assert type(model.layers[1].up) is nn.Linear
        quantize_model(model, allow_non_finite=True, double_quant=False)
        assert nf4_names(model) == LINEARS


def test_dequantize_model_keeps_dtype_and_frees_nothing_else() -> None:
    model = make()
    quantize_model(model, embeddings=True)
    expected = {name: model.get_submodule(name).dequantize(torch.bfloat16) for name in LINEARS}
    assert dequantize_model(model, torch.bfloat16) == ["embed", *LINEARS]
    for name, dense in expected.items():
        assert_same_bits(model.get_submodule(name).weight.detach(), dense)
    with pytest.raises(ValueError, match="dequantize_model: model must contain"):
        dequantize_model(NF4Linear(3, 3))
    with pytest.raises(TypeError, match="dequantize_model: dtype must be"):
        dequantize_model(model, torch.float64)


def test_a_model_on_meta_gets_empty_layers_for_a_checkpoint() -> None:
    source = make()
    quantize_model(source)
    model = make().to("meta")
    assert len(quantize_model(model).layers) == 4
    assert model.layers[0].up.weight.is_meta
    model.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(model(TOKENS).detach(), source(TOKENS).detach())


class TestMemory:
    def test_each_source_is_freed_before_the_next_layer(self) -> None:
        model = make()
        alive = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
        seen = []
        quantize_model(
            model,
            progress=lambda done, *_: seen.append([ref() is not None for ref in alive]),
        )
        # The layer just replaced may live until the callback returns, the ones before it not.
        for done, states in enumerate(seen):
            assert not any(states[:done])
            assert all(states[done + 1 :])
        assert not any(ref() is not None for ref in alive)

    @pytest.mark.skipif(
        "cpp" not in feinwerk.backends.available(), reason="needs the native extension"
    )
    def test_at_most_one_byte_an_element_beside_the_source(self) -> None:
        """Resident memory in a process of its own, which sees every allocator."""
        size = 4096 * 4096
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        sizes = json.loads(done.stdout)
        assert sizes["peak"] <= size
        # Two fp32 sources of 64 MiB are gone, two NF4 copies of 8.3 MiB are there.
        assert sizes["after"] <= -2 * 3.3 * size
        # The same measure sees one dense copy, so a pass above means something.
        assert sizes["control"] > 4 * size


MEASURE = """
import json, torch
from torch import nn
from feinwerk import NF4Weight, quantize_model

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

def peak_of(run):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    run()
    return status("VmHWM") - before, status("VmRSS") - before

def with_a_copy():
    copy = weight.clone()
    NF4Weight.from_dense(weight[:512])

quantize_model(nn.Sequential(nn.Linear(1024, 512)))  # first use of everything
model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(2)))
weight = torch.ones(4096, 4096)
peak, after = peak_of(lambda: quantize_model(model))
control, _ = peak_of(with_a_copy)
print(json.dumps(dict(peak=peak, after=after, control=control)))
"""


def test_is_public() -> None:
    assert feinwerk.quantize_model is quantize_model
    assert feinwerk.nn.quantize_model is quantize_model
