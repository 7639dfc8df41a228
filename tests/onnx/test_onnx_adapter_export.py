"""Exported graphs and adapter files agree: every layer's names, DoRA's norms from the file's bytes.

What an adapter file does in a session is shown in test_onnx_adapter_file.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_budget
import onnxruntime
import pytest
import torch
from torch import nn

import feinwerk
from feinwerk.nn import adapters_of, add_adapters, dequantize_model
from feinwerk.nn import save_adapter as save_folder
from feinwerk.onnx import AdapterRoom, export, load_adapter, register, save_adapter

peft = pytest.importorskip("peft")

LAYERS = ("embed", "first", "block.up", "block.same", "head")
TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": LAYERS},
    "rslora": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": LAYERS[1:]},
    "dora": {"r": 2, "lora_alpha": 7, "dora": True, "target_modules": LAYERS[1:]},
    "fewer": {"r": 3, "lora_alpha": 6, "target_modules": ["same"]},
}


class Net(nn.Module):
    """NF4 with and without a bias, two layers of one shape, a dense head, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.first = nn.Linear(64, 96)
        self.block = nn.ModuleDict(
            {"up": nn.Linear(96, 96, bias=False), "same": nn.Linear(96, 96, bias=False)}
        )
        self.head = nn.Linear(96, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(tokens)).relu()
        return self.head(self.block["same"](self.block["up"](x)))


def make_net(double_quant: bool = True) -> Net:
    torch.manual_seed(0)
    net = Net()
    options = {"blocksize": 32, "double_quant": double_quant}
    feinwerk.quantize_model(net, skip=("head",), embeddings=True, **options)
    return net.eval()


def make_adapted(kind: str, **options: Any) -> Net:
    net = make_net(**options)
    add_adapters(net, **KINDS[kind])
    generator = torch.Generator().manual_seed(len(kind))
    for layer in adapters_of(net).values():
        with torch.no_grad():
            layer.lora_A.normal_(std=0.2, generator=generator)
            layer.lora_B.normal_(std=0.2, generator=generator)
            if hasattr(layer, "magnitude"):
                layer.magnitude.mul_(torch.rand(layer.magnitude.shape, generator=generator) + 0.5)
    return net.eval()


def open_session(path: Path, library: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if library:
        register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def assert_result(session: Any, options: Any, net: Net, folder: Path) -> None:
    """Within the budget around stock PEFT's result in fp64."""
    (y,) = session.run(["y"], {"tokens": TOKENS.numpy()}, options)
    peer, truth = net(TOKENS), make_net()
    dequantize_model(truth)
    truth.double()
    if adapters_of(net):
        save_folder(net, folder)
        truth = peft.PeftModel.from_pretrained(truth, folder).double().merge_and_unload()
    onnx_budget.assert_result(y, peer, truth, truth.head, TOKENS)


def write_graph(net: Net, path: Path, **options: Any) -> Path:
    export(net, (TOKENS,), path, input_names=["tokens"], output_names=["y"], **options)
    return path


@pytest.fixture(scope="module", params=["feinwerk", "contrib", "portable"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / f"{request.param}.onnx"
    return write_graph(make_net(), path, ops=request.param, adapters=AdapterRoom(LAYERS, dora=True))


def test_one_exported_file_serves_every_adapter(graph: Path, tmp_path: Path) -> None:
    session = open_session(graph)
    options = {}
    for kind in KINDS:
        path = tmp_path / f"{kind}.onnx_adapter"
        save_adapter(make_adapted(kind), path, model=graph)
        options[kind] = load_adapter(path, session).run_options()
    for kind in ["lora", "fewer", "dora", "rslora", "lora"]:
        assert_result(session, options[kind], make_adapted(kind), tmp_path / kind)
    assert_result(session, None, make_net(), tmp_path / "none")


def test_every_layer_has_inputs_of_its_own(graph: Path) -> None:
    session = open_session(graph)
    parts = ("lora_A", "lora_B", "scaling", "gain")
    expected = {f"{layer}.{part}" for layer in LAYERS for part in parts}
    assert {node.name for node in session.get_overridable_initializers()} == expected


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("external_data", [False, True])
def test_norms_from_the_file_s_bytes_are_those_of_the_model(
    double_quant: bool, external_data: bool, tmp_path: Path
) -> None:
    net = make_adapted("dora", double_quant=double_quant)
    save_folder(net, tmp_path / "folder")
    room = AdapterRoom(LAYERS[1:], dora=True)
    path = tmp_path / "net.onnx"
    write_graph(make_net(double_quant), path, adapters=room, external_data=external_data)
    assert (tmp_path / "net.onnx.data").exists() == external_data
    names = save_adapter(tmp_path / "folder", tmp_path / "of_folder", model=path)
    assert sorted(names) == sorted(LAYERS[1:])
    save_adapter(net, tmp_path / "of_model", model=path)
    values = [read(tmp_path / name) for name in ("of_folder", "of_model")]
    assert values[0] == values[1]
    assert {name for name in values[0] if name.endswith("gain")} == {
        f"{layer}.gain" for layer in LAYERS[1:]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_a_dense_base(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype).eval()
    bare = copy.deepcopy(net)
    add_adapters(net, 3, lora_alpha=5, dora=True)
    for layer in adapters_of(net).values():
        nn.init.normal_(layer.lora_B)
    save_folder(net, tmp_path / "folder")
    path = tmp_path / "net.onnx"
    export(bare, (torch.zeros(2, 64, dtype=dtype),), path, adapters=AdapterRoom(("0",), dora=True))
    save_adapter(tmp_path / "folder", tmp_path / "of_folder", model=path)
    save_adapter(net, tmp_path / "of_model", model=path)
    assert read(tmp_path / "of_folder") == read(tmp_path / "of_model")


def read(path: Path) -> dict[str, tuple[list[int], bytes]]:
    found = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: (value.shape(), value.numpy().tobytes()) for name, value in found.items()}


def test_a_graph_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    """Its values are the defaults; another adapter takes their place in a run."""
    path = write_graph(make_adapted("dora"), tmp_path / "net.onnx")
    session = open_session(path)
    assert_result(session, None, make_adapted("dora"), tmp_path / "dora")
    save_adapter(make_adapted("fewer"), tmp_path / "fewer.onnx_adapter", model=path)
    options = load_adapter(tmp_path / "fewer.onnx_adapter", session).run_options()
    assert_result(session, options, make_adapted("fewer"), tmp_path / "fewer")
    # The same adapter as a file gives the same bits as its defaults.
    save_adapter(make_adapted("dora"), tmp_path / "dora.onnx_adapter", model=path)
    options = load_adapter(tmp_path / "dora.onnx_adapter", session).run_options()
    feeds = {"tokens": TOKENS.numpy()}
    default, switched = (session.run(["y"], feeds, o)[0].tobytes() for o in (None, options))
    assert default == switched


def test_a_folder_with_dora_over_a_stock_graph(tmp_path: Path) -> None:
    save_folder(make_adapted("dora"), tmp_path / "folder")
    room = AdapterRoom(LAYERS, dora=True)
    path = write_graph(make_net(), tmp_path / "net.onnx", ops="contrib", adapters=room)
    with pytest.raises(ValueError, match=r'model must name a graph of ops="feinwerk"'):
        save_adapter(tmp_path / "folder", tmp_path / "a.onnx_adapter", model=path)


def test_the_same_file_without_the_library(tmp_path: Path) -> None:
    room = AdapterRoom(LAYERS, dora=True)
    path = write_graph(make_net(), tmp_path / "net.onnx", adapters=room)
    session = open_session(path, library=False)
    for kind in KINDS:
        save_adapter(make_adapted(kind), tmp_path / "a.onnx_adapter", model=path)
        options = load_adapter(tmp_path / "a.onnx_adapter", session).run_options()
        assert_result(session, options, make_adapted(kind), tmp_path / kind)
