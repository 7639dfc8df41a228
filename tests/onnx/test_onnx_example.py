"""The C++ program of the documentation: builds without ONNX Runtime's headers, runs its models."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_rules import expected
from onnx_specs import LOW_RANK, Spec, make, model_of, same_bits
from torch import nn

import feinwerk
from feinwerk import onnx as feinwerk_onnx

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "c" / "onnx_example.cpp"
HEADERS = ROOT / "tests" / "c" / "onnxruntime"
ROWS, COLS = 3, 70


def libonnxruntime() -> Path:
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip(f"the onnxruntime {onnxruntime.__version__} wheel has no libonnxruntime.so")
    return found[0]


def compiler() -> str:
    found = shutil.which("c++")
    assert found, "the extension was built with one"
    return found


def command(*parts: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in parts], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "onnx_example"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{HEADERS}")
    built = command(compiler(), *flags, SOURCE, "-ldl", "-o", path)
    assert built.returncode == 0, built.stderr
    return path


def node(x: torch.Tensor, r: int) -> Spec:
    return make("NF4LoraLinear", N=11, K=COLS, r=r, bias=True).but(x=x)


def activations() -> torch.Tensor:
    """The x that the program makes."""
    return (7 * torch.arange(ROWS * COLS) % 31 / 16 - 1).reshape(ROWS, COLS)


def saved_model(folder: Path) -> Path:
    """The operation without an adapter: A, B and scaling are inputs with values to fall back on."""
    model = model_of(node(activations(), r=0).fixed())
    for name, shape in zip(LOW_RANK, (["r", COLS], [11, "r"], [1]), strict=True):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for value in model.graph.initializer:
        if value.name == "scaling":  # an adapter file has no tensor without dimensions
            value.dims.append(1)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def saved_adapter(folder: Path, spec: Spec) -> Path:
    adapter = onnxruntime.AdapterFormat()
    parts = {name: spec.inputs[name] for name in LOW_RANK}
    parts["scaling"] = parts["scaling"].reshape(1)
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v.numpy()) for k, v in parts.items()}
    adapter.set_parameters(values)
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    path = folder / "adapter.onnx_adapter"
    adapter.export_adapter(str(path))
    return path


def output(text: str) -> torch.Tensor:
    """What the program printed: the shape, then a value a line."""
    first, *values = text.splitlines()
    word, *shape = first.split()
    assert word == "shape"
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
    return numbers.float().reshape([int(size) for size in shape])


def test_it_runs_a_model_and_switches_an_adapter(program: Path, tmp_path: Path) -> None:
    plain, adapted = node(activations(), r=0), node(activations(), r=3)
    arguments = (libonnxruntime(), feinwerk_onnx.library_path(), saved_model(tmp_path), ROWS, COLS)
    for more, spec in (((), plain), ((saved_adapter(tmp_path, adapted),), adapted)):
        result = command(program, *arguments, *more)
        assert result.returncode == 0, result.stderr
        assert same_bits(output(result.stdout), expected(spec))
    assert not same_bits(expected(plain), expected(adapted))


def test_it_runs_what_export_and_save_adapter_write(program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLS, 33), nn.ReLU(), nn.Linear(33, 11)).eval()
    feinwerk.quantize_model(model, skip=())
    x, path = activations(), tmp_path / "exported.onnx"
    room = feinwerk_onnx.AdapterRoom(("0", "2"))
    feinwerk_onnx.export(model, (x,), path, adapters=room, input_names=["x"], output_names=["y"])
    plain = model(x).detach()
    feinwerk.nn.add_adapters(model, 4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapter = tmp_path / "trained.onnx_adapter"
    feinwerk_onnx.save_adapter(model, adapter, model=path)
    adapted = model.eval()(x).detach()

    arguments = (libonnxruntime(), feinwerk_onnx.library_path(), path, ROWS, COLS)
    for more, y in (((), plain), ((adapter,), adapted)):
        result = command(program, *arguments, *more)
        assert result.returncode == 0, result.stderr
        assert same_bits(output(result.stdout), y)
    assert not same_bits(plain, adapted)


def test_the_guide_shows_pieces_of_this_program() -> None:
    page = (ROOT / "docs" / "guides" / "deployment_c.md").read_text(encoding="utf-8")
    program = "\n".join(line.strip() for line in SOURCE.read_text(encoding="utf-8").splitlines())
    pieces = re.findall(r"^```cpp\n(.*?)^```", page, re.M | re.S)
    assert len(pieces) >= 4
    for piece in pieces:
        assert "\n".join(line.strip() for line in piece.splitlines()) in program, piece


def test_it_says_what_is_wrong(program: Path, tmp_path: Path) -> None:
    ort, ours, model = libonnxruntime(), feinwerk_onnx.library_path(), saved_model(tmp_path)
    absent = tmp_path / "absent"
    for arguments, says in (
        ((absent, ours, model, ROWS, COLS), "absent"),
        ((ours, ours, model, ROWS, COLS), "is not ONNX Runtime"),
        ((ort, absent, model, ROWS, COLS), "absent"),
        ((ort, ours, absent, ROWS, COLS), "absent"),
        ((ort, ours, model, -1, COLS), "ROWS and COLS must be sizes"),
        ((ort, ours, model, ROWS, COLS - 1), "NF4LoraLinear: x must"),
        ((ort, ours, model, ROWS, COLS, model), "dapter"),
    ):
        result = command(program, *arguments)
        assert result.returncode == 1, result.stdout
        assert says in result.stderr
    assert command(program).returncode == 2


def members() -> list[str]:
    """The functions of OrtApi that the stand-in header names."""
    text = (HEADERS / "onnxruntime_c_api.h").read_text(encoding="utf-8")
    return re.findall(r"\(\*(\w+)\)\(", text.partition("typedef struct OrtApi {")[2])


# OrtApi's places never move; docs and headers of every version since 1.20 have these.
SLOTS = {
    "GetErrorMessage": 2, "CreateEnv": 3, "CreateSession": 7, "Run": 9,
    "CreateSessionOptions": 10, "SetIntraOpNumThreads": 24, "SessionGetInputCount": 30,
    "SessionGetOutputCount": 31, "SessionGetInputName": 36, "SessionGetOutputName": 37,
    "CreateRunOptions": 39, "CreateTensorWithDataAsOrtValue": 49, "GetTensorMutableData": 51,
    "GetTensorElementType": 60, "GetDimensionsCount": 61, "GetDimensions": 62,
    "GetTensorShapeElementCount": 64, "GetTensorTypeAndShape": 65, "CreateCpuMemoryInfo": 69,
    "AllocatorFree": 76, "GetAllocatorWithDefaultOptions": 78, "ReleaseEnv": 92,
    "ReleaseStatus": 93, "ReleaseMemoryInfo": 94, "ReleaseSession": 95, "ReleaseValue": 96,
    "ReleaseRunOptions": 97, "ReleaseTensorTypeAndShapeInfo": 99, "ReleaseSessionOptions": 100,
    "RegisterCustomOpsLibrary_V2": 228, "CreateLoraAdapter": 280, "ReleaseLoraAdapter": 282,
    "RunOptionsAddActiveLoraAdapter": 283,
}  # fmt: skip


def test_the_stand_in_header_has_every_function_in_its_place(tmp_path: Path) -> None:
    table = [name for name in members() if name not in ("GetApi", "GetVersionString")]
    assert set(table) == set(SLOTS)
    rules = "".join(
        f'_Static_assert(offsetof(OrtApi, {name}) == {slot} * sizeof(void*), "{name}");\n'
        for name, slot in SLOTS.items()
    )
    file = tmp_path / "slots.c"
    file.write_text(f"#include <onnxruntime_c_api.h>\n{rules}")
    built = command("cc", "-std=c11", "-Wall", "-Werror", "-fsyntax-only", f"-I{HEADERS}", file)
    assert built.returncode == 0, built.stderr
