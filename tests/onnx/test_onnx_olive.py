"""Olive's own engine runs FeinwerkNF4Export: over a small Llama with its adapter, plain models."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx_budget
import onnxruntime
import pytest
import torch
from torch import nn

import feinwerk
from feinwerk.nn import (
    NF4Linear,
    adapters_of,
    add_adapters,
    dequantize_model,
    load_adapter,
    save_adapter,
)
from feinwerk.onnx import register

pytest.importorskip("olive", reason="Olive is not installed (pip install 'feinwerk[olive]')")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
TOKENS = torch.arange(3, 15).view(2, 6)

LOADER = """
import torch
from torch import nn
import feinwerk

def make_dense(path):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))

def make_nf4(path):
    model = make_dense(path)
    feinwerk.quantize_model(model, skip=(), blocksize=128, double_quant=False)
    return model
"""
OPTIONS = {"skip": [], "blocksize": 32, "double_quant": True}
# Neither telemetry nor downloads.
QUIET = {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def olive(arguments: list[str], folder: Path) -> str:
    """Run Python in `folder`; return what it printed."""
    run = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | QUIET, cwd=folder, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def write_workflow(folder: Path, name: str, model: dict[str, Any], options: dict[str, Any]) -> None:
    workflow = {
        "input_model": model,
        "passes": {"nf4": {"type": "FeinwerkNF4Export", **options}},
        "cache_dir": f"{name}_cache",
        "output_dir": name,
    }
    (folder / f"{name}.json").write_text(json.dumps(workflow))


def make_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def write_llama(folder: Path) -> None:
    """A checkpoint in bf16 with a tokenizer, an adapter for it, and the workflow for both."""
    from tokenizers import Tokenizer, models

    make_llama().bfloat16().save_pretrained(folder / "checkpoint")
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder / "checkpoint")
    ours = make_llama()
    add_adapters(ours, 4, lora_alpha=8, target_modules=["q_proj", "down_proj"], dora=True)
    for layer in adapters_of(ours).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(ours, folder / "adapter")
    model = {"type": "HfModel", "model_path": "checkpoint", "task": "text-generation"}
    options = {"genai_config": True, "adapter_targets": ["v_proj"]}
    write_workflow(folder, "llama", model | {"adapter_path": "adapter"}, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workflows lie and run."""
    folder: Path = tmp_path_factory.mktemp("olive")
    write_llama(folder)
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    loading = {"quantization_method": "bitsandbytes", "quantization_config": quantization}
    model = {"type": "HfModel", "model_path": "checkpoint", "task": "text-generation"}
    # Options that the layers are not quantized by: they hold NF4 already.
    write_workflow(folder, "bnb", model | {"load_kwargs": loading}, OPTIONS)
    (folder / "loader.py").write_text(LOADER)
    io_config = {"input_names": ["x"], "input_shapes": [[2, 64]], "output_names": ["y"]}
    for name in ("dense", "nf4"):
        model = {
            "type": "PyTorchModel",
            "model_script": "loader.py",
            "model_loader": f"make_{name}",
        }
        write_workflow(folder, name, model | {"io_config": io_config}, OPTIONS)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    """What olive_run.py has found."""
    printed = olive([str(HERE / "olive_run.py"), "llama", "bnb", "dense", "nf4"], folder)
    return json.loads(printed.splitlines()[-1])


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_a_llama_with_its_adapter(folder: Path, results: Any) -> None:
    check_llama(folder, Path(results["models"]["llama"]) / "model.onnx")


def check_llama(folder: Path, path: Path) -> None:
    files = {file.name for file in path.parent.iterdir()}
    assert {"config.json", "tokenizer.json", "genai_config.json"} <= files
    session = open_session(path)
    room = {node.name.split(".")[-2] for node in session.get_overridable_initializers()}
    assert room == {"q_proj", "down_proj", "v_proj"}
    feeds: dict[str, Any] = {
        "input_ids": TOKENS.numpy(),
        "attention_mask": torch.ones_like(TOKENS).numpy(),
        "position_ids": torch.arange(6).repeat(2, 1).numpy(),
    }
    for node in session.get_inputs():
        feeds.setdefault(node.name, numpy.zeros((2, 2, 0, 16), "f4"))
    (logits,) = session.run(["logits"], feeds)
    with torch.no_grad():
        peer, truth = with_adapter(folder / "adapter")
        onnx_budget.assert_result(logits, peer, truth, truth.lm_head, TOKENS)


def with_adapter(adapter: Path) -> tuple[torch.Tensor, Any]:
    """Feinwerk's logits over the quantized checkpoint, and stock PEFT's model of it in fp64."""
    model = make_llama().bfloat16()
    feinwerk.quantize_model(model)
    truth = copy.deepcopy(model.float())
    load_adapter(model, adapter)
    dequantize_model(truth, torch.float32)
    truth = peft.PeftModel.from_pretrained(truth.double(), adapter).double().merge_and_unload()
    return model.eval()(TOKENS).logits, truth


def assert_same_bytes(path: Path, model: nn.Module) -> None:
    """The file holds the codes and scales of every NF4 layer."""
    held = {
        onnx.numpy_helper.to_array(tensor, str(path.parent)).tobytes()
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    assert layers
    for layer in layers:
        assert layer.weight.numpy().tobytes() in held
        assert layer.absmax.numpy().tobytes() in held


def test_layers_of_bitsandbytes_keep_their_bytes(results: Any) -> None:
    pytest.importorskip("bitsandbytes")
    twin = make_llama().bfloat16()
    feinwerk.quantize_model(twin, double_quant=False)  # byte-equal to bitsandbytes
    assert_same_bytes(Path(results["models"]["bnb"]) / "model.onnx", twin)


@pytest.mark.parametrize("name", ["dense", "nf4"])
def test_a_plain_model(name: str, results: Any) -> None:
    path = Path(results["models"][name])
    variables: dict[str, Any] = {}
    exec(LOADER, variables)
    twin = variables[f"make_{name}"]("")
    if name == "dense":
        feinwerk.quantize_model(twin, **OPTIONS)
    assert_same_bytes(path, twin)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    (y,) = open_session(path).run(["y"], {"x": x.numpy()})
    with torch.no_grad():
        peer = twin(x)
        dequantize_model(twin)
        truth = twin.double()
        onnx_budget.assert_result(y, peer, truth, truth[-1], x.double())


def test_the_package_config_is_olive_s_with_one_more_pass(results: Any) -> None:
    expected = {"more": ["feinwerknf4export"], "changed": [], "same_extras": True}
    assert results["merged"] == expected | {"class": "FeinwerkNF4Export"}


def test_options_that_are_refused(results: Any) -> None:
    ops, blocksize, none = results["refusals"]
    start = "FeinwerkNF4Export: "
    assert ops == f'{start}ops must be "feinwerk", "contrib" or "portable", got \'best\''
    assert blocksize.startswith(f"{start}blocksize must be ")
    assert none == ""


@pytest.mark.full
def test_the_command_line(folder: Path) -> None:
    write = "from feinwerk.integrations.olive import *; write_package_config('passes.json')"
    olive(["-c", write], folder)
    workflow = json.loads((folder / "llama.json").read_text())
    workflow |= {"output_dir": "by_command", "cache_dir": "cache_of_command"}
    (folder / "command.json").write_text(json.dumps(workflow))
    arguments = ["--config", "command.json", "--package-config", "passes.json"]
    olive(["-m", "olive", "run", *arguments], folder)
    (path,) = (folder / "by_command").rglob("*.onnx")
    check_llama(folder, path)
