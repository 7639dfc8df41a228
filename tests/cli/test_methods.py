"""The quickstart's methods: each trains fused, and its adapter is PEFT's."""

from __future__ import annotations

import json

import pytest
import torch
from quickstart_flags import arguments

import feinwerk
from feinwerk.cli import checkpoint, main, model, training
from feinwerk.cli.settings import METHODS, Settings


@pytest.fixture(scope="module", params=sorted(METHODS))
def of_method(request, tiny_model, questions, tmp_path_factory, keep_threads):
    """(method, folder) of a run of every method."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = arguments(tiny_model, questions, folder, method=request.param)
    assert main([*flags, "--no-generate"]) == 0
    return request.param, folder


def test_the_adapter_is_the_trained_one_and_loads_in_stock_peft(of_method, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from feinwerk.integrations.peft import fuse

    method, folder = of_method
    saved = checkpoint.load(folder)
    settings = Settings.from_dict(saved["settings"])
    source = model.find_model(str(tiny_model))
    base, _ = model.load_model(source, cache=False)
    model.hold(base, settings, lambda *_: None)
    trained = model.attach_adapters(base, settings, source)
    training.Trainer(trained, [], settings, 6).load_state_dict(saved["trainer"])

    def loaded(quantize=settings.quantized):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
        if quantize:
            feinwerk.quantize_model(fresh)
        return PeftModel.from_pretrained(fresh, folder / "adapter").eval()

    ids = AutoTokenizer.from_pretrained(tiny_model)("What is thing 3?", return_tensors="pt")
    stock = loaded()
    with torch.no_grad():
        ours = trained.eval()(**ids).logits
        theirs = stock(**ids).logits
        with stock.disable_adapter():
            plain = stock(**ids).logits
        fuse(stock)
        assert torch.equal(ours, stock(**ids).logits)
        # Stock PEFT on the same weights, dense and in fp64: neither may be far from it.
        exact = loaded(quantize=False)
        if settings.quantized:
            held = dict(trained.named_modules())
            for name, layer in exact.named_modules():
                if name.endswith(".base_layer"):
                    layer.weight.data = held[name].dequantize(torch.float32)
        truth = exact.double()(**ids).logits
    error, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max()
    assert error <= allowed + 1e-6 * truth.abs().max()
    assert (ours - plain).abs().max() > 100 * error
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == source.name
    assert config["r"] == 4
    assert config["use_dora"] is method.endswith("dora")
    assert config["use_rslora"] is (method == "rslora")


def test_every_method_runs_fused_and_says_what_it_did(of_method, tiny_model):
    method, folder = of_method
    numbers = json.loads((folder / "report.json").read_text())
    text = (folder / "report.md").read_text()
    name = METHODS[method]
    assert f"fine-tuned with {name} (r = 4" in text
    assert ("held in NF4" in text) is method.startswith("q")
    shrunk = numbers["bytes"]["linears_after"] / numbers["bytes"]["linears_before"]
    assert (shrunk < 0.2) if method.startswith("q") else (shrunk == 1)
    assert numbers["held_out_loss"]["after"] < numbers["held_out_loss"]["before"]
    assert numbers["comparison"] is None

    settings = Settings(model=str(tiny_model), method=method, rank=4, dtype="float32")
    source = model.find_model(settings.model)
    base, _ = model.load_model(source, cache=False)
    model.hold(base, settings, lambda *_: None)
    rows = feinwerk.explain(model.attach_adapters(base, settings, source)).rows
    paths = {row.path for row in rows if row.layer.startswith(("Fused", "lora."))}
    assert paths == {"fused"}


@pytest.mark.parametrize("option", [["--blocksize", "128"], ["--no-double-quant"]])
def test_options_of_nf4_are_refused_for_dense_weights(option, capsys):
    assert main(["quickstart", "--method", "dora", *option]) == 2
    assert "must be left out: --method dora has no NF4 weights" in capsys.readouterr().err
