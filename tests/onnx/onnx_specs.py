"""One node of Feinwerk's ONNX operations, well formed or not: its model and its run.

A Spec says what the node has, right or wrong; onnx_rules.py says what must come of it.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from feinwerk.testing import make_weight, make_x

NESTED = ("nested_absmax", "nested_codebook", "nested_offset")
LOW_RANK = ("lora_A", "lora_B", "scaling")
INPUTS = {
    "NF4Linear": ("x", "packed", "absmax", "bias", *NESTED),
    "NF4LoraLinear": ("x", "packed", "absmax", *LOW_RANK, "gain", "bias", *NESTED),
    "LoraLinear": ("x", "weight", *LOW_RANK, "gain", "bias"),
    "NF4Embedding": ("indices", "packed", "absmax", *NESTED),
}
REQUIRED = {
    "NF4Linear": 3,
    "NF4LoraLinear": 6,
    "LoraLinear": 5,
    "NF4Embedding": 3,
}
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
TORCH_TYPES = {value: key for key, value in ONNX_TYPES.items()}
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Spec:
    """A node: the operation, its attributes and inputs, and which inputs are initializers."""

    op: str
    attributes: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    constant: frozenset[str] = field(default_factory=frozenset)
    # What the graph says of its inputs: "open" not even their rank, "symbolic" that, or "exact".
    shapes: str = "open"

    def but(self, **inputs: torch.Tensor | None) -> Spec:
        """The same with some inputs replaced, and those given as None left off."""
        merged = {k: v for k, v in (self.inputs | inputs).items() if v is not None}
        return replace(self, inputs=merged)

    def having(self, **attributes: Any) -> Spec:
        """The same with some attributes replaced, and those given as None left off."""
        merged = {k: v for k, v in (self.attributes | attributes).items() if v is not None}
        return replace(self, attributes=merged)

    def declared(self, shapes: str) -> Spec:
        """The same with the graph's inputs declared in this way."""
        return replace(self, shapes=shapes)

    def fixed(self, *names: str) -> Spec:
        """The same with these inputs (all but the first, if none is named) as initializers."""
        chosen = names or INPUTS[self.op][1:]
        return replace(self, constant=frozenset(chosen) & set(self.inputs))

    @property
    def first(self) -> torch.Tensor | None:
        """The activations or the indices."""
        return self.inputs.get(INPUTS[self.op][0])

    def describe(self) -> str:
        """All of it in one line, for the report of a failure."""
        inputs = {
            name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            + ("*" if name in self.constant else "")
            for name, value in self.inputs.items()
        }
        return f"{self.op} {self.attributes} {inputs} (*: an initializer) shapes {self.shapes}"


def make(
    op: str,
    *,
    N: int = 6,
    K: int = 70,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = (2,),
    double_quant: bool = False,
    bias: bool = False,
    r: int = 3,
    gain: bool = False,
) -> Spec:
    """A well-formed node; all its inputs are given at run time."""
    weight = make_weight(N, K, blocksize=block_size, double_quant=double_quant)
    inputs: dict[str, torch.Tensor] = {}
    attributes: dict[str, Any] = {}
    if op == "NF4Embedding":
        inputs["indices"] = torch.arange(torch.Size(rows).numel()).reshape(rows) * 5 % N
        attributes["to"] = ONNX_TYPES[dtype]
    else:
        inputs["x"] = make_x((*rows, K), dtype)
    if op == "LoraLinear":
        inputs["weight"] = weight.dense(dtype)
    else:
        inputs |= {"packed": weight.packed.reshape(-1), "absmax": weight.absmax}
        attributes |= {"N": N, "K": K, "block_size": block_size}
        if double_quant:
            inputs |= dict(zip(NESTED, weight.nested, strict=True))
    if "lora_A" in INPUTS[op]:
        inputs["lora_A"] = make_x((r, K), torch.float32, seed=2) / 8
        inputs["lora_B"] = make_x((N, r), torch.float32, seed=3) / 8
        inputs["scaling"] = torch.tensor(1.5)
        if gain:
            inputs["gain"] = make_x((N,), torch.float32, seed=4)
    if bias:
        inputs["bias"] = make_x((N,), dtype, seed=5)
    return Spec(op, attributes, inputs)


def tensor_proto(name: str, value: torch.Tensor) -> TensorProto:
    proto = TensorProto(name=name, data_type=ONNX_TYPES[value.dtype], dims=value.shape)
    proto.raw_data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return proto


def node_of(spec: Spec) -> onnx.NodeProto:
    names = [name if name in spec.inputs else "" for name in INPUTS[spec.op]]
    while names and not names[-1]:
        names.pop()
    return helper.make_node(spec.op, names, ["y"], "node", domain="feinwerk", **spec.attributes)


def output_type(spec: Spec) -> int:
    if spec.op == "NF4Embedding":
        to = spec.attributes.get("to", TensorProto.FLOAT)
        return to if isinstance(to, int) and to in TORCH_TYPES else TensorProto.FLOAT
    return ONNX_TYPES[spec.first.dtype] if spec.first is not None else TensorProto.FLOAT


def model_of(spec: Spec, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """The model of one node, or of `nodes` with the spec's inputs and the output y."""
    declared = {
        "open": lambda name, value: None,
        "symbolic": lambda name, value: [f"{name}_{i}" for i in range(value.dim())],
        "exact": lambda name, value: list(value.shape),
    }[spec.shapes]
    values = [
        helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], declared(name, value))
        for name, value in spec.inputs.items()
        if name not in spec.constant
    ]
    graph = helper.make_graph(
        nodes or [node_of(spec)],
        "graph",
        values,
        [helper.make_tensor_value_info("y", output_type(spec), None)],
        [tensor_proto(name, spec.inputs[name]) for name in sorted(spec.constant)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("feinwerk", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def options_with(library: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Every buffer is an allocation of its own, past whose ends AddressSanitizer sees.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # an error is what the exception says
    options.register_custom_ops_library(library)
    return options


def session_of(model: onnx.ModelProto | bytes, library: str) -> onnxruntime.InferenceSession:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(
        data, options_with(library), providers=["CPUExecutionProvider"]
    )


def to_ort(value: torch.Tensor) -> onnxruntime.OrtValue:
    value = value.contiguous().clone()  # of exactly this size, not a part of something larger
    if value.dtype is torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            value.view(torch.uint16).numpy(), TensorProto.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())


def to_torch(value: onnxruntime.OrtValue) -> torch.Tensor:
    dtype, shape = TORCH_TYPES[value.element_type()], value.shape()
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def feed_of(spec: Spec) -> dict[str, onnxruntime.OrtValue]:
    return {k: to_ort(v) for k, v in spec.inputs.items() if k not in spec.constant}


def run(spec: Spec, library: str) -> torch.Tensor:
    """Build the model, open a session, run it once."""
    session = session_of(model_of(spec), library)
    return to_torch(session.run_with_ort_values(["y"], feed_of(spec))[0])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtypes, shapes and bytes."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
