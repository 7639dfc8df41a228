"""onnxruntime-genai generates what our own loop does, with the custom-op library and without."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import feinwerk
from feinwerk.nn import adapters_of, add_adapters
from feinwerk.onnx import (
    AdapterRoom,
    export_causal_lm,
    generate,
    library_path,
    load_adapter,
    register,
    save_adapter,
    write_genai_config,
)

transformers = pytest.importorskip("transformers")
genai = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed", exc_type=ImportError
)

PROMPT = [3, 14, 15, 2, 6, 5]  # 2 is also what ends and pads a text, as in SmolLM2
TARGETS = ("q_proj", "v_proj", "down_proj")
NEW = 20


def make_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip


def make_model(adapter: str = "") -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(make_config())
    feinwerk.quantize_model(model)
    if adapter:
        add_adapters(model, 4, lora_alpha=8, target_modules=TARGETS, dora=adapter == "dora")
        for layer in adapters_of(model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
    return model.eval()


FORMS = ["feinwerk", "contrib", pytest.param("portable", marks=pytest.mark.full)]


@pytest.fixture(scope="module", params=FORMS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model in a folder of its own."""
    path: Path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    model = make_model()
    export_causal_lm(model, path, ops=request.param, adapters=AdapterRoom(TARGETS, dora=True))
    write_genai_config(path, model, session_options={"intra_op_num_threads": 1})
    return path


def tokens_of_genai(model: Any, adapters: Any = None, name: str = "") -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = genai.Generator(model, parameters)
    if adapters is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(numpy.array([PROMPT], numpy.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def tokens_of_ours(session: Any, **options: Any) -> list[int]:
    ids = numpy.array([PROMPT])
    new = generate(session, ids, max_new_tokens=NEW, **options)[0]
    return PROMPT + [int(token) for token in new]


def test_the_same_tokens(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # genai also accepts libraries of the working directory; here only the model's folder helps.
    monkeypatch.chdir(tmp_path)
    model = genai.Model(str(path.parent))
    session = open_session(path)
    expected = tokens_of_ours(session)
    assert tokens_of_genai(model) == expected
    assert len(set(expected)) > 5  # no loop over a few tokens that any model would fall into

    adapters = genai.Adapters(model)
    found = [expected]
    for kind in ("lora", "dora"):
        file = tmp_path / f"{kind}.onnx_adapter"
        save_adapter(make_model(kind), file, model=path)
        adapters.load(str(file), kind)
        found.append(tokens_of_ours(session, adapter=load_adapter(file, session)))
        assert tokens_of_genai(model, adapters, kind) == found[-1]
    assert found[0] != found[1] != found[2] != found[0]
    assert tokens_of_genai(model) == expected


def test_the_library_is_loaded_where_the_graph_needs_it(path: Path) -> None:
    config = json.loads((path.parent / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    name = os.path.basename(library_path())
    if path.parent.name.startswith("feinwerk"):
        assert options["custom_ops_library"] == name
        assert (path.parent / name).read_bytes() == Path(library_path()).read_bytes()
    else:
        assert "custom_ops_library" not in options
        assert not (path.parent / name).exists()


@pytest.mark.parametrize("path", ["feinwerk"], indirect=True)
def test_a_library_elsewhere_is_refused_by_genai(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Why write_genai_config copies: a path or a link to the installed library is not enough."""
    monkeypatch.chdir(tmp_path)  # whose own libraries genai would load
    shutil.copytree(path.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "genai_config.json"
    (tmp_path / "copy" / "link.so").symlink_to(library_path())
    for name in (library_path(), "link.so"):
        content = json.loads(config.read_text())
        content["model"]["decoder"]["session_options"]["custom_ops_library"] = str(name)
        config.write_text(json.dumps(content))
        with pytest.raises(RuntimeError, match="path is not within an allowed directory"):
            genai.Model(str(config.parent))


def test_without_custom_ops_the_bodies_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(path.parent, tmp_path / "copy")
    config = write_genai_config(tmp_path / "copy" / path.name, make_config(), custom_ops=False)
    assert "custom_ops_library" not in config.read_text()
    assert tokens_of_genai(genai.Model(str(config.parent))) == tokens_of_ours(open_session(path))


def edit(path: Path, to: Path, change: Any) -> Path:
    graph = onnx.load(path)
    change(graph.graph)
    onnx.save(graph, to)
    return to


def without_logits(graph: Any) -> None:
    graph.output[0].name = "scores"


def with_input(graph: Any) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("images", 1, [1]))


def without_cache(graph: Any) -> None:
    for value in graph.input:
        value.name = value.name.replace("past_key_values", "memory")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_logits, "logits must be an output of the graph"),
        (with_input, "images must have a default: onnxruntime-genai does not feed it"),
        (without_cache, r"past_key_values\.0\.key must be an input of the graph"),
    ],
)
def test_other_graphs_are_refused(change: Any, message: str, path: Path, tmp_path: Path) -> None:
    copy = edit(path, tmp_path / "changed.onnx", change)
    with pytest.raises(ValueError, match=f"write_genai_config: {message}"):
        write_genai_config(copy, make_config())
    assert [file.name for file in tmp_path.iterdir()] == ["changed.onnx"]


def test_a_config_of_another_model_is_refused(path: Path) -> None:
    config = make_config()
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"num_hidden_layers must be 2 as in model\.onnx, got 3"):
        write_genai_config(path, config)
    config = make_config()
    config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id must be given"):
        write_genai_config(path, config)
