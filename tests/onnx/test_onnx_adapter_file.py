"""Adapter files: one session, many adapters, each with torch's results; what is refused, and when.

The graph is made of standard ops with the fixed input names (adapter_graph.py); that an export has
the same names is shown in test_onnx_adapter_export.py.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx_budget
import onnxruntime
import pytest
import safetensors.torch
import torch
from adapter_graph import write_graph
from torch import nn

from feinwerk.nn import adapters_of
from feinwerk.nn import load_adapter as load_into_torch
from feinwerk.onnx import load_adapter, save_adapter

peft = pytest.importorskip("peft")

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.block = nn.ModuleDict({"up": nn.Linear(96, 33, bias=False), "down": nn.Linear(33, 24)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["down"](self.block["up"](self.first(x)))


LAYERS = ["first", "block.up", "block.down"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"up": 3.5}},
    "rslora": {"r": 16, "lora_alpha": 10, "use_rslora": True, "rank_pattern": {"down": 1}},
    "dora": {"r": 3, "lora_alpha": 9, "use_dora": True, "rank_pattern": {"^first": 8}},
    "fewer": {"r": 2, "lora_alpha": 4, "target_modules": ["up"]},
}


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def make_peft(kind: str) -> Any:
    """PEFT's model with an adapter that changes the result a lot."""
    config = peft.LoraConfig(**{"target_modules": ["first", "up", "down"], **KINDS[kind]})
    model = peft.get_peft_model(make_net(), config).eval()
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            if "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What PEFT writes for every kind of adapter."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        make_peft(kind).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("graph") / "net.onnx"
    write_graph({name: make_net().get_submodule(name) for name in LAYERS}, path)
    return path


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every input that has a default
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(graph: Path) -> Any:
    return open_session(graph)


def run(session: Any, options: Any = None) -> torch.Tensor:
    return torch.from_numpy(session.run(["y"], {"x": X.numpy()}, options)[0])


@torch.no_grad()
def truth_of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's result in fp64, and how far from it a session's may be."""
    model = make_peft(kind) if kind else make_net()
    peer = model(X)
    merged = model.double().merge_and_unload() if kind else model.double()
    return onnx_budget.truth_and_budget(peer, merged, merged.block["down"], X.double())


def assert_result(y: torch.Tensor, kind: str) -> None:
    truth, budget = truth_of(kind)
    assert ((y - truth).abs() <= budget).all()


def save(kind: str, folders: dict[str, Path], tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / f"{kind}.onnx_adapter"
    save_adapter(folders[kind], path, **options)
    return path


def values(path: Path) -> dict[str, Any]:
    read = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: value.numpy().copy() for name, value in read.items()}


def write(path: Path, tensors: dict[str, Any]) -> Path:
    content = onnxruntime.AdapterFormat()
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    content.set_parameters({name: make(value) for name, value in tensors.items()})
    content.export_adapter(str(path))
    return path


def test_one_session_switches_between_adapters(
    folders: dict[str, Path], graph: Path, session: Any, tmp_path: Path
) -> None:
    base = make_net()
    paths = {
        kind: save(kind, folders, tmp_path, model=base if kind in ("lora", "dora") else graph)
        for kind in KINDS
    }
    # A file without `model`, or with a torch model, knows nothing of the graph's room for DoRA.
    adapters = {kind: load_adapter(paths[kind], session) for kind in KINDS if kind != "lora"}
    adapters["lora"] = load_adapter(paths["lora"], session, partial=True)
    for kind in ["lora", "dora", "fewer", "rslora", "dora", "lora"]:
        assert_result(run(session, adapters[kind].run_options()), kind)
    assert_result(run(session), "")
    # None of these would pass for another.
    truths = [truth_of(kind) for kind in ["", *KINDS]]
    for i, (truth, budget) in enumerate(truths):
        assert all(((truth - other).abs() > budget).any() for other, _ in truths[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_adapters_and_their_folder_give_the_same_file(
    kind: str, folders: dict[str, Path], graph: Path, tmp_path: Path
) -> None:
    ours = make_net()
    names = load_into_torch(ours, folders[kind])
    expected = values(save(kind, folders, tmp_path, model=make_net()))
    assert sorted(save_adapter(ours, tmp_path / "live")) == sorted(names)
    live = values(tmp_path / "live")
    assert live.keys() == expected.keys()
    for name, value in live.items():
        assert value.dtype == numpy.float32
        assert value.tobytes() == expected[name].tobytes(), name
    for name, layer in adapters_of(ours).items():
        assert live[f"{name}.scaling"] == numpy.float32(layer.scaling)
    assert any(name.endswith(".gain") for name in live) == (kind == "dora")


def test_the_names_are_exactly_the_graph_s(
    folders: dict[str, Path], graph: Path, session: Any, tmp_path: Path
) -> None:
    inputs = {node.name for node in session.get_overridable_initializers()}
    for kind in ("lora", "rslora", "fewer"):
        assert values(save(kind, folders, tmp_path, model=graph)).keys() == inputs


def test_a_layer_left_alone_hides_the_graph_s_default(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The graph was exported with an adapter of its own; another one adapts fewer layers."""
    defaults = values(save("dora", folders, tmp_path, model=make_net()))
    path = tmp_path / "net.onnx"
    write_graph({name: make_net().get_submodule(name) for name in LAYERS}, path, defaults=defaults)
    session = open_session(path)
    assert_result(run(session), "dora")
    fewer = load_adapter(save("fewer", folders, tmp_path, model=path), session)
    assert set(fewer.layers) == set(LAYERS)
    assert_result(run(session, fewer.run_options()), "fewer")
    bare = save("fewer", folders, tmp_path)
    with pytest.raises(ValueError, match=r"block\.up\.gain|first\.lora_A"):
        load_adapter(bare, session)
    # Partial means what it says: the other layers keep the exported adapter.
    mixed = run(session, load_adapter(bare, session, partial=True).run_options())
    truth, budget = truth_of("fewer")
    assert ((mixed - truth).abs() > budget).any()


def test_two_adapters_in_one_run(folders: dict[str, Path], session: Any, tmp_path: Path) -> None:
    whole = values(save("lora", folders, tmp_path))
    parts = []
    for name in ("first", "block"):
        some = {key: value for key, value in whole.items() if key.startswith(name)}
        parts.append(load_adapter(write(tmp_path / name, some), session, partial=True))
    assert_result(run(session, parts[0].run_options(parts[1])), "lora")
    with pytest.raises(
        ValueError, match=r"run_options: first\.lora_A must be set by one adapter in a run, got"
    ):
        parts[0].run_options(load_adapter(tmp_path / "lora.onnx_adapter", session, partial=True))


def test_run_options_keep_their_adapter(
    folders: dict[str, Path], graph: Path, session: Any, tmp_path: Path
) -> None:
    options = load_adapter(save("lora", folders, tmp_path, model=graph), session).run_options()
    gc.collect()
    assert_result(run(session, options), "lora")


def test_a_file_that_a_session_maps_can_be_replaced(
    folders: dict[str, Path], graph: Path, session: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx_adapter"
    save_adapter(folders["lora"], path, model=graph)
    first = load_adapter(path, session)
    save_adapter(folders["rslora"], path, model=graph)
    assert_result(run(session, first.run_options()), "lora")
    assert_result(run(session, load_adapter(path, session).run_options()), "rslora")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx_adapter"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_old_runtime_is_named(
    folders: dict[str, Path], session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save("lora", folders, tmp_path)
    monkeypatch.delattr(onnxruntime, "LoraAdapter")
    with pytest.raises(ImportError, match=r"onnxruntime must be 1\.20 or newer .*, got \d"):
        load_adapter(path, session)
    with pytest.raises(ImportError, match=r"onnxruntime must be 1\.20 or newer .*, got \d"):
        save("lora", folders, tmp_path)


def edit(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], to: Path) -> Path:
    """A copy of an adapter's folder with its config and tensors changed."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    to.mkdir()
    (to / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, to / "adapter_model.safetensors")
    return to


def renamed(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if ".up." in key]:
        tensors[key.replace(".up.", ".side.")] = tensors.pop(key)


def narrower(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    key = "base_model.model.first.lora_A.weight"
    tensors[key] = tensors[key][:, :60].clone()


def with_bias(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["lora_bias"] = True
    tensors["base_model.model.first.lora_B.bias"] = torch.zeros(96)


def pissa(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["init_lora_weights"] = "pissa"


def wrong_rank(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["r"] = 5


def with_arrow(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["modules_to_save"] = ["head"]


REFUSED: list[tuple[Callable[..., None], str]] = [
    (renamed, r"block\.side\.lora_A must be an input of net\.onnx, got adapter inputs for 3"),
    (narrower, r"first\.lora_A must have shape \[first\.r, 64\] as in net\.onnx, got \[4, 60\]"),
    (with_bias, r"first\.lora_bias must be absent"),
    (pissa, r"init_lora_weights must leave the base as it is.*got 'pissa'"),
    (wrong_rank, r"lora_A and lora_B must be \[5, K\] and \[N, 5\]"),
    (with_arrow, r"modules_to_save must be None"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_what_cannot_be_saved_leaves_the_file_as_it_was(
    change: Callable[..., None],
    message: str,
    folders: dict[str, Path],
    graph: Path,
    tmp_path: Path,
) -> None:
    folder = edit(folders["lora"], change, tmp_path / "edited")
    path = tmp_path / "a.onnx_adapter"
    path.write_text("as it was")
    with pytest.raises(ValueError, match=f"save_adapter: .*{message}"):
        save_adapter(folder, path, model=graph)
    assert path.read_text() == "as it was"
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "edited"]


def test_dora_needs_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    with pytest.raises(ValueError, match=r"model must be given for DoRA.*got None, and .* has a"):
        save_adapter(folders["dora"], path)
    bare = tmp_path / "bare.onnx"
    write_graph({name: make_net().get_submodule(name) for name in LAYERS}, bare, dora=False)
    with pytest.raises(ValueError, match=r"gain must be an input of bare\.onnx, which was"):
        save_adapter(folders["dora"], path, model=bare)
    with pytest.raises(ValueError, match=r"block\.up must be a layer of Sequential"):
        save_adapter(folders["fewer"], path, model=nn.Sequential(nn.Linear(2, 2)))
    other = make_net()
    other.first = nn.Linear(64, 95)
    with pytest.raises(ValueError, match=r"first must have N = 95 and K = 64 .*, got N = 96"):
        save_adapter(folders["dora"], path, model=other)
    assert not path.exists()


def without_up(tensors: dict[str, Any]) -> None:
    del tensors["block.up.lora_B"]


def other_name(tensors: dict[str, Any]) -> None:
    tensors["block.side.lora_A"] = tensors.pop("block.up.lora_A")


def half(tensors: dict[str, Any]) -> None:
    tensors["first.lora_A"] = tensors["first.lora_A"].astype("f2")


def transposed(tensors: dict[str, Any]) -> None:
    tensors["first.lora_A"] = tensors["first.lora_A"].T


def other_rank(tensors: dict[str, Any]) -> None:
    tensors["first.lora_B"] = numpy.zeros((96, 5), "f4")


MISFITS: list[tuple[Callable[..., None], str]] = [
    (without_up, r"block\.up\.lora_B must be in the file.*got 11 others in"),
    (other_name, r"block\.side\.lora_A must be an input of the session's model"),
    (half, r"first\.lora_A must be a tensor\(float\), got a tensor\(float16\)"),
    (transposed, r"first\.lora_A must have shape \[first\.r, 64\], got \[64, 4\]"),
    (other_rank, r"first\.lora_B must have the rank of first\.lora_A, 4, got \[96, 5\]"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=lambda v: getattr(v, "__name__", ""))
def test_what_does_not_fit_the_session_is_refused_before_a_run(
    change: Callable[..., None],
    message: str,
    folders: dict[str, Path],
    graph: Path,
    session: Any,
    tmp_path: Path,
) -> None:
    tensors = values(save("lora", folders, tmp_path, model=graph))
    change(tensors)
    path = write(tmp_path / "changed", tensors)
    with pytest.raises(ValueError, match=f"load_adapter: {message}"):
        load_adapter(path, session)


def test_files_that_are_no_adapters(folders: dict[str, Path], session: Any, tmp_path: Path) -> None:
    whole = save("lora", folders, tmp_path).read_bytes()
    path = tmp_path / "broken"
    for content in (b"", b"no adapter at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="broken must be an adapter file that ONNX Runtime"):
            load_adapter(path, session)
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load_adapter(tmp_path / "none", session)
