"""One binary, many runtimes: the library in the oldest, a middle and the newest onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import ELEMENT_TYPES, node_model, weight_attributes, weight_tensors
from onnx_wheels import unpacked

import feinwerk
import feinwerk.onnx
from feinwerk import NF4Weight, testing

RUN = Path(__file__).with_name("onnx_version_run.py")
N, K, RANK = 96, 128, 4
# The last ones before the 2.x of NumPy, which onnxruntime before 1.19 was not built for.
NUMPY = "numpy==1.26.4"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)  # with a wheel of each of these


def with_casts(model: bytes, dtype: torch.dtype) -> bytes:
    """The model with float32 where it has dtype at its borders."""
    proto = onnx.load_from_string(model)
    graph, kind = proto.graph, ELEMENT_TYPES[dtype]
    [node] = graph.node
    for item in graph.input:
        if item.type.tensor_type.elem_type == kind != TensorProto.FLOAT:
            item.type.tensor_type.elem_type = TensorProto.FLOAT
            cast = helper.make_node("Cast", [item.name], [f"{item.name}_cast"], to=kind)
            graph.node.insert(0, cast)
            for i, name in enumerate(node.input):
                if name == item.name:
                    graph.node[-1].input[i] = f"{name}_cast"
    graph.node[-1].output[0] = "y_before"
    graph.node.append(helper.make_node("Cast", ["y_before"], ["y"], to=TensorProto.FLOAT))
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    graph.value_info.append(helper.make_tensor_value_info("y_before", kind, None))
    return proto.SerializeToString()


def store(folder: Path, name: str, model: bytes, feeds: dict[str, torch.Tensor], y: torch.Tensor):
    (folder / f"{name}.onnx").write_bytes(model)
    arrays = {
        key: (value.float() if value.is_floating_point() else value).numpy()
        for key, value in {**feeds, "y": y}.items()
    }
    np.savez(folder / f"{name}.npz", **arrays)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models of every operator and type, with what Python computes for them."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(N, K, generator=generator)
    A, B = torch.randn(RANK, K, generator=generator), torch.randn(N, RANK, generator=generator)
    gain = torch.rand(N, generator=generator) + 0.5
    ones = torch.ones(N)
    for dtype in testing.DTYPES:
        x, bias = testing.make_x((2, 3, K), dtype), testing.make_x((N,), dtype, seed=2)
        for form in ("plain", "nested"):
            weight = NF4Weight.from_dense(dense, double_quant=form == "nested")
            tensors, sizes = weight_tensors(weight), weight_attributes(weight)
            tables = (weight.absmax, weight.nested_absmax, weight.nested_codebook)
            tables += (weight.nested_offset,)
            adapter = {"lora_A": A, "lora_B": B, "scaling": torch.tensor([0.5]), "gain": gain}
            short = str(dtype).removeprefix("torch.")
            dora = feinwerk.dora_linear(
                x, weight.packed, A, B, gain, None, *tables, weight_norm=ones, scaling=0.5
            )
            indices = torch.tensor([[0, N - 1, 3]])
            rows = feinwerk.nf4_embedding(
                indices, weight.packed, *tables, N=N, K=K, blocksize=64, dtype=dtype
            )
            to = {**sizes, "to": ELEMENT_TYPES[dtype]}
            for op, inputs, given, y, fed in (
                ("NF4Linear", {"x": x, "bias": bias, **tensors}, sizes, weight.linear(x, bias), 2),
                # A double-quantized weight without bias: absent inputs between others.
                ("NF4Linear-hole", {"x": x, **tensors}, sizes, weight.linear(x), 1),
                ("NF4LoraLinear", {"x": x, **tensors, **adapter}, sizes, dora, 1),
                ("NF4Embedding", {"indices": indices, **tensors}, to, rows, 1),
            ):
                constant = tuple(name for name in inputs if name not in list(inputs)[:fed])
                model = node_model(
                    op.partition("-")[0], inputs, given, dtype=dtype, constant=constant
                )
                feeds = {name: inputs[name] for name in list(inputs)[:fed]}
                store(folder, f"{op}-{form}-{short}", with_casts(model, dtype), feeds, y)
        inputs = {"x": x, "weight": dense.to(dtype), **adapter}
        y = feinwerk.dora_linear(x, dense.to(dtype), A, B, gain, weight_norm=ones, scaling=0.5)
        model = node_model("LoraLinear", inputs, {}, dtype=dtype, constant=("weight",))
        store(folder, f"LoraLinear-{short}", with_casts(model, dtype), inputs | {}, y)
        stored = folder / f"LoraLinear-{short}.npz"
        np.savez(stored, **{k: v for k, v in np.load(stored).items() if k != "weight"})
    return folder


def run(folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, RUN, feinwerk.onnx.library_path(), folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def wheels(version: str) -> list[Path]:
    """Where a version of onnxruntime lies, and a NumPy that it works with."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        pytest.skip(f"onnxruntime=={version} has no wheel for this Python")
    return [unpacked(f"onnxruntime=={version}"), unpacked(NUMPY)]


@pytest.mark.parametrize("version", ["1.17.3", "1.22.1", "installed"])
def test_every_operator_and_type(models: Path, version: str) -> None:
    result = run(models, *([] if version == "installed" else wheels(version)))
    assert result.returncode == 0, result.stdout + result.stderr
    *lines, version_line = result.stdout.split("\n")[:-1]
    assert version_line == (onnxruntime.__version__ if version == "installed" else version)
    assert len(lines) == len(list(models.glob("*.onnx"))) == 27


def test_a_runtime_that_is_too_old_is_told_so(tmp_path: Path) -> None:
    result = run(tmp_path, *wheels("1.16.3"))
    assert result.returncode == 1
    assert "feinwerk: onnxruntime must be 1.17 or newer, got 1.16.3" in result.stderr
