"""The four operators in ONNX Runtime: Python's bits, the error budget, shapes, threads, ISAs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx_models import (
    ELEMENT_TYPES,
    node_model,
    run,
    session,
    weight_attributes,
    weight_tensors,
)

import feinwerk
import feinwerk.onnx
from feinwerk import NF4Weight, testing
from feinwerk.testing.adapter_budget import adapter_budget
from feinwerk.testing.adapters import Adapter, AdapterCase

N, K, RANK, SCALING = 200, 192, 5, 0.75
ROWS = (0, 1, 3, 17, 65)
THREADS = (1, 2, 3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = Path(__file__).resolve()


def nf4(double_quant: bool, columns: int = K, blocksize: int = 64) -> NF4Weight:
    generator = torch.Generator().manual_seed(11)
    dense = torch.randn(N, columns, generator=generator)
    return NF4Weight.from_dense(dense, double_quant=double_quant, blocksize=blocksize)


def adapter(columns: int = K) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "lora_A": torch.randn(RANK, columns, generator=generator),
        "lora_B": torch.randn(N, RANK, generator=generator),
        "scaling": torch.tensor(SCALING),
        "gain": torch.rand(N, generator=generator) + 0.5,
    }


def make_bias(dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-2, 2, N).to(dtype)


def nested(weight: NF4Weight) -> tuple[torch.Tensor | None, ...]:
    return weight.absmax, weight.nested_absmax, weight.nested_codebook, weight.nested_offset


def python_nf4(
    weight: NF4Weight, x: torch.Tensor, tensors: dict[str, torch.Tensor], r: int
) -> torch.Tensor:
    """What the Python functions return for the inputs of NF4Linear or NF4LoraLinear."""
    bias, gain = tensors.get("bias"), tensors.get("gain")
    if r == 0 and gain is None:
        return weight.linear(x, bias)
    A, B = tensors["lora_A"], tensors["lora_B"]
    if r == 0:  # of rank 0: the same as one that adds zero
        A, B = torch.ones(1, weight.shape[1]), torch.zeros(N, 1)
    options = {"scaling": SCALING, "blocksize": weight.blocksize}
    if gain is None:
        return feinwerk.lora_linear(x, weight.packed, A, B, bias, None, *nested(weight), **options)
    return feinwerk.dora_linear(
        x, weight.packed, A, B, gain, bias, *nested(weight), weight_norm=torch.ones(N), **options
    )


def forms() -> Iterator[tuple[torch.dtype, bool, bool]]:
    """Dtype, double quantization, whether there is a bias."""
    return itertools.product(DTYPES, (False, True), (False, True))


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize(("columns", "blocksize"), [(K, 64), (65, 32), (256, 4096)])
def test_nf4_linear_has_pythons_bits(columns: int, blocksize: int, constant: bool) -> None:
    for dtype, double_quant, has_bias in forms():
        weight = nf4(double_quant, columns, blocksize)
        tensors = weight_tensors(weight)
        if has_bias:
            tensors["bias"] = make_bias(dtype)
        inputs = {"x": torch.zeros(1, columns, dtype=dtype), **tensors}
        model = node_model(
            "NF4Linear", inputs, weight_attributes(weight), dtype=dtype,
            constant=tuple(tensors) if constant else (), shapes={"x": ("rows", columns)},
        )  # fmt: skip
        for threads in THREADS:
            opened = session(model, threads)
            for rows in ROWS:
                x = testing.make_x((rows, columns), dtype)
                y = run(opened, {**tensors, "x": x})
                testing.assert_same_bits(y, python_nf4(weight, x, tensors, 0), f"{dtype} {rows}")


def adapter_forms(
    r: int, has_gain: bool, has_bias: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tensors = adapter()
    tensors["lora_A"] = tensors["lora_A"][:r].clone()
    tensors["lora_B"] = tensors["lora_B"][:, :r].contiguous()
    if not has_gain:
        del tensors["gain"]
    if has_bias:
        tensors["bias"] = make_bias(dtype)
    return tensors


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize("has_gain", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("r", [0, RANK])
def test_nf4_lora_linear_has_pythons_bits(r: int, has_gain: bool, constant: bool) -> None:
    for dtype, double_quant, has_bias in forms():
        weight = nf4(double_quant)
        tensors = adapter_forms(r, has_gain, has_bias, dtype) | weight_tensors(weight)
        inputs = {"x": torch.zeros(1, K, dtype=dtype), **tensors}
        model = node_model(
            "NF4LoraLinear", inputs, weight_attributes(weight), dtype=dtype,
            constant=tuple(tensors) if constant else ("packed",), shapes={"x": ("rows", K)},
        )  # fmt: skip
        for threads in THREADS:
            opened = session(model, threads)
            for rows in ROWS:
                x = testing.make_x((rows, K), dtype)
                y = run(opened, {**tensors, "x": x})
                testing.assert_same_bits(y, python_nf4(weight, x, tensors, r), f"{dtype} {rows}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [0, RANK])
def test_lora_linear_is_within_the_budget(r: int, dtype: torch.dtype) -> None:
    for has_bias, constant, rows in itertools.product((False, True), (False, True), ROWS):
        tensors = adapter_forms(r, False, has_bias, dtype)
        tensors["weight"] = testing.make_x((N, K), dtype, seed=3)
        x = testing.make_x((rows, K), dtype)
        model = node_model(
            "LoraLinear", {"x": x, **tensors}, {}, dtype=dtype,
            constant=("weight",) if constant else (),
        )  # fmt: skip
        y = run(session(model), {**tensors, "x": x})
        if r == 0:
            testing.assert_within_budget(y, x, tensors["weight"], tensors.get("bias"))
            continue
        case = AdapterCase(
            x, tensors["weight"], (Adapter(tensors["lora_A"], tensors["lora_B"], SCALING),),
            torch.zeros(rows, N, dtype=dtype), tensors.get("bias"),
        )  # fmt: skip
        truth, budget = adapter_budget(case, engine=False)["y"]
        testing.assert_within(y, truth, budget, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_with_a_gain_is_doras(dtype: torch.dtype) -> None:
    for r, has_bias, rows in itertools.product((0, RANK), (False, True), ROWS):
        tensors = adapter_forms(r, True, has_bias, dtype)
        weight = tensors["weight"] = testing.make_x((N, K), dtype, seed=3)
        x = testing.make_x((rows, K), dtype)
        y = run(
            session(node_model("LoraLinear", {"x": x, **tensors}, {}, dtype=dtype)),
            {**tensors, "x": x},
        )
        A, B = tensors["lora_A"], tensors["lora_B"]
        if r == 0:
            A, B = torch.ones(1, K), torch.zeros(N, 1)
        want = feinwerk.dora_linear(
            x, weight, A, B, tensors["gain"], tensors.get("bias"),
            weight_norm=torch.ones(N), scaling=SCALING,
        )  # fmt: skip
        testing.assert_same_bits(y, want)


def test_nf4_embedding_has_pythons_bits() -> None:
    for dtype, double_quant, constant in itertools.product(DTYPES, (False, True), (False, True)):
        for columns, blocksize in ((K, 64), (65, 32)):
            weight = nf4(double_quant, columns, blocksize)
            tensors = weight_tensors(weight)
            attributes = weight_attributes(weight)
            if dtype is not torch.float32:
                attributes["to"] = ELEMENT_TYPES[dtype]
            for shape in ((), (0,), (7,), (2, 0, 3), (3, 40)):
                indices = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1))
                model = node_model(
                    "NF4Embedding", {"indices": indices, **tensors}, attributes, dtype=dtype,
                    constant=tuple(tensors) if constant else (),
                )  # fmt: skip
                out = run(session(model), {**tensors, "indices": indices})
                want = feinwerk.nf4_embedding(
                    indices, weight.packed, *nested(weight),
                    N=N, K=columns, blocksize=blocksize, dtype=dtype,
                )  # fmt: skip
                testing.assert_same_bits(out, want)


def test_leading_dimensions_and_a_vector() -> None:
    weight = nf4(True)
    tensors = weight_tensors(weight)
    for shape in ((K,), (1, K), (2, 3, K), (2, 1, 3, K), (0, 4, K), (2, 1, 1, 1, 2, K)):
        x = testing.make_x((*shape,), torch.float32)
        model = node_model(
            "NF4Linear", {"x": x, **tensors}, weight_attributes(weight),
            dtype=torch.float32, constant=tuple(tensors),
        )  # fmt: skip
        want = weight.linear(x.reshape(-1, K)).reshape(*shape[:-1], N)
        testing.assert_same_bits(run(session(model), {"x": x}), want)


def test_an_empty_tensor_is_an_absent_input() -> None:
    weight, dtype = nf4(False), torch.float32
    none = torch.zeros(0)
    empty = dict.fromkeys(("nested_absmax", "nested_codebook", "nested_offset", "bias"), none)
    x = testing.make_x((3, K), dtype)
    want = weight.linear(x)
    tensors = {**weight_tensors(weight), **empty}
    lora = {**tensors, **adapter_forms(0, False, False, dtype), "gain": none}
    for op, inputs in (("NF4Linear", tensors), ("NF4LoraLinear", lora)):
        for constant in (tuple(inputs), ()):
            model = node_model(
                op, {"x": x, **inputs}, weight_attributes(weight), dtype=dtype, constant=constant
            )
            testing.assert_same_bits(run(session(model), {"x": x, **inputs}), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_are_inferred_with_symbolic_dimensions(dtype: torch.dtype) -> None:
    weight = nf4(True)
    tensors, attributes = weight_tensors(weight), weight_attributes(weight)
    x = torch.zeros(1, 1, K, dtype=dtype)
    shapes = {"x": ("batch", "sequence", K), "indices": ("batch", "sequence")}
    adapted = adapter()
    dense = {"weight": torch.zeros(N, K, dtype=dtype), **adapted}
    to = {**attributes, "to": ELEMENT_TYPES[dtype]}
    indices = torch.zeros(1, 1, dtype=torch.int64)
    for op, inputs, given, last in (
        ("NF4Linear", {"x": x, **tensors}, attributes, N),
        ("NF4LoraLinear", {"x": x, **tensors, **adapted}, attributes, N),
        ("LoraLinear", {"x": x, **dense}, {}, N),
        ("NF4Embedding", {"indices": indices, **tensors}, to, K),
    ):
        model = node_model(op, inputs, given, dtype=dtype, shapes=shapes)
        [output] = session(model).get_outputs()
        assert output.shape == ["batch", "sequence", last], op
        unnamed = {name: (None, *shape[1:]) for name, shape in shapes.items()}
        [output] = session(node_model(op, inputs, given, dtype=dtype, shapes=unnamed)).get_outputs()
        assert output.shape[1:] == ["sequence", last], op
        assert isinstance(output.shape[0], str), op


def test_the_library_registers_twice() -> None:
    options = onnxruntime.SessionOptions()
    feinwerk.onnx.register(options)
    feinwerk.onnx.register(options)
    weight = nf4(True)
    x = testing.make_x((2, K), torch.float32)
    model = node_model(
        "NF4Linear", {"x": x, **weight_tensors(weight)}, weight_attributes(weight),
        dtype=torch.float32, constant=tuple(weight_tensors(weight)),
    )  # fmt: skip
    opened = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    testing.assert_same_bits(run(opened, {"x": x}), weight.linear(x))
    with pytest.raises(TypeError, match=r"register: session_options must be an onnxruntime\.S"):
        feinwerk.onnx.register(object())


def isas() -> list[object]:
    """What this CPU has; the best one serves every other test here."""
    names = [name.removeprefix("cpp-") for name in testing.backend_ids() if name != "reference"]
    return [
        name if name in ("scalar", "avx2", "neon") else pytest.param(name, marks=pytest.mark.full)
        for name in names
    ]


# Another instruction set needs a process of its own: the library chooses at its first use.
@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set(isa: str) -> None:
    names = (
        "nf4_linear_has_pythons_bits[192-64-constant]",
        "nf4_embedding_has_pythons_bits",
        f"nf4_lora_linear_has_pythons_bits[{RANK}-dora-constant]",
    )
    tests = [f"{HERE}::test_{name}" for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "FEINWERK_ISA": isa},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_an_unknown_instruction_set_is_said_at_registration() -> None:
    code = "import onnxruntime, sys; "
    code += "onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, feinwerk.onnx.library_path()],
        env={**os.environ, "FEINWERK_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FEINWERK_ISA: the instruction set must be one of " in result.stderr
