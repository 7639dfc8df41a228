"""Our declaration of ONNX Runtime's interface against the real header, where that can be had."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from onnx_wheels import unpacked

ROOT = Path(__file__).resolve().parents[2]
ABI = ROOT / "csrc" / "onnx" / "ort_abi.h"
# The only package that carries the C header, of version 17.
PACKAGE = "amd-quark==0.13"


def entries() -> dict[str, int]:
    """Every function that we call, and its place in the table."""
    found = re.findall(r"constexpr Entry<(\d+), .*> (\w+);$", ABI.read_text(), re.MULTILINE)
    return {name: int(place) for place, name in found}


def op_members() -> list[str]:
    """The members of our CustomOp, in order."""
    body = re.search(r"struct CustomOp \{(.*?)\n\};", ABI.read_text(), re.DOTALL)[1]
    return ["version", *re.findall(r"\(\*(\w+)\)\(", body)]


# The same members, as the real header calls them.
REAL_MEMBERS = """
    version CreateKernel GetName GetExecutionProviderType GetInputType GetInputTypeCount
    GetOutputType GetOutputTypeCount KernelCompute KernelDestroy GetInputCharacteristic
    GetOutputCharacteristic GetInputMemoryType GetVariadicInputMinArity
    GetVariadicInputHomogeneity GetVariadicOutputMinArity GetVariadicOutputHomogeneity
    CreateKernelV2 KernelComputeV2 InferOutputShapeFn GetStartVersion GetEndVersion
"""
ENUMS = {
    "kUndefined": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED",
    "kFloat": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT",
    "kUint8": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8",
    "kInt64": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64",
    "kFloat16": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16",
    "kBfloat16": "ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16",
    "kFail": "ORT_FAIL",
    "kInvalidArgument": "ORT_INVALID_ARGUMENT",
    "kRuntimeException": "ORT_RUNTIME_EXCEPTION",
    "kNotImplemented": "ORT_NOT_IMPLEMENTED",
    "kRequired": "INPUT_OUTPUT_REQUIRED",
    "kOptional": "INPUT_OUTPUT_OPTIONAL",
    "kAttributeInt": "ORT_OP_ATTR_INT",
}


def assertions(entries: dict[str, int]) -> str:
    """A C++ file that compiles only if header and declaration agree."""
    lines = ["#include <cstddef>", "#include <onnxruntime_c_api.h>", f'#include "{ABI}"']
    lines.append("namespace ours = feinwerk::ort;")
    for name, place in entries.items():
        lines.append(f"static_assert(offsetof(OrtApi, {name}) == {place} * sizeof(void*));")
    lines.append("static_assert(sizeof(OrtApi) == sizeof(ours::Api));")
    lines.append("static_assert(ORT_API_VERSION == ours::kApiVersion);")
    for mine, real in zip(op_members(), REAL_MEMBERS.split(), strict=True):
        lines.append(
            f"static_assert(offsetof(OrtCustomOp, {real}) == offsetof(ours::CustomOp, {mine}));"
        )
    lines.append("static_assert(sizeof(OrtCustomOp) == sizeof(ours::CustomOp));")
    for member, real in (("get_api", "GetApi"), ("get_version", "GetVersionString")):
        lines.append(
            f"static_assert(offsetof(OrtApiBase, {real}) == offsetof(ours::ApiBase, {member}));"
        )
    for mine, real in ENUMS.items():
        lines.append(f"static_assert(int({real}) == int(ours::{mine}));")
    return "\n".join([*lines, ""])


def compiled(folder: Path, source: str, headers: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "assertions.cpp"
    path.write_text(source)
    return subprocess.run(
        ["g++", "-std=c++17", "-Wno-invalid-offsetof", f"-I{headers}", "-fsyntax-only", path],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def headers() -> Path:
    found = list(unpacked(PACKAGE).rglob("onnxruntime_c_api.h"))
    assert found, f"{PACKAGE} carries no onnxruntime_c_api.h"
    return found[0].parent


def test_our_declaration_is_the_headers(headers: Path, tmp_path: Path) -> None:
    assert len(entries()) >= 30
    result = compiled(tmp_path, assertions(entries()), headers)
    assert result.returncode == 0, result.stderr


def test_a_wrong_place_would_be_found(headers: Path, tmp_path: Path) -> None:
    wrong = entries()
    wrong["KernelContext_ParallelFor"] += 1
    result = compiled(tmp_path, assertions(wrong), headers)
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr


def test_the_sources_call_the_table_by_its_entries_only() -> None:
    for path in sorted(ABI.parent.glob("*")):
        if path != ABI:
            assert not re.search(r"entries\[|->entries|reinterpret_cast<.*Api", path.read_text()), (
                path
            )
