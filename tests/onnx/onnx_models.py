"""ONNX models of one Feinwerk node each, and sessions that run them with the custom-op library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

import feinwerk
import feinwerk.onnx
from feinwerk import NF4Weight

ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}
INPUTS = {
    "NF4Linear": (
        *("x", "packed", "absmax", "bias"),
        *("nested_absmax", "nested_codebook", "nested_offset"),
    ),
    "NF4LoraLinear": (
        *("x", "packed", "absmax", "lora_A", "lora_B", "scaling", "gain", "bias"),
        *("nested_absmax", "nested_codebook", "nested_offset"),
    ),
    "LoraLinear": ("x", "weight", "lora_A", "lora_B", "scaling", "gain", "bias"),
    "NF4Embedding": (
        *("indices", "packed", "absmax", "nested_absmax", "nested_codebook", "nested_offset"),
    ),
}

Tensors = Mapping[str, torch.Tensor]


def weight_tensors(weight: NF4Weight) -> dict[str, torch.Tensor]:
    """The inputs of an NF4 weight by their names in the operators."""
    names = ("packed", "absmax", "nested_absmax", "nested_codebook", "nested_offset")
    tensors = {name: getattr(weight, name) for name in names}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def weight_attributes(weight: NF4Weight) -> dict[str, int]:
    """N, K and block_size."""
    rows, columns = weight.shape
    return {"N": rows, "K": columns, "block_size": weight.blocksize}


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any dtype, in order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def to_proto(name: str, tensor: torch.Tensor) -> TensorProto:
    """The tensor as an initializer."""
    proto = TensorProto(name=name, data_type=ELEMENT_TYPES[tensor.dtype], dims=tensor.shape)
    proto.raw_data = to_bytes(tensor) if tensor.numel() else b""
    return proto


def node_model(
    op: str,
    tensors: Tensors,
    attributes: Mapping[str, int],
    *,
    dtype: torch.dtype,
    constant: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
) -> bytes:
    """A serialized model of one node.

    Args:
        op: the operator.
        tensors: every input that the node has, by name; others are absent.
        attributes: the node's attributes.
        dtype: of the output.
        constant: inputs that become initializers; the others are the graph's inputs.
        shapes: declared shapes of graph inputs, where they differ from the tensors'.
    """
    names = [name if name in tensors else "" for name in INPUTS[op]]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], domain="feinwerk", **attributes)
    feeds = [
        helper.make_tensor_value_info(
            name, ELEMENT_TYPES[tensor.dtype], (shapes or {}).get(name, tuple(tensor.shape))
        )
        for name, tensor in tensors.items()
        if name not in constant
    ]
    graph = helper.make_graph(
        [node],
        op,
        feeds,
        [helper.make_tensor_value_info("y", ELEMENT_TYPES[dtype], None)],
        [to_proto(name, tensors[name]) for name in constant if name in tensors],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("feinwerk", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return model.SerializeToString()


def session(model: bytes | str, threads: int = 2) -> onnxruntime.InferenceSession:
    """A session with the library and so many intra-op threads, which do not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    feinwerk.onnx.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """The tensor as a value that a session takes; bfloat16 has no numpy dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is not torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)


def tensor_of(result: onnxruntime.OrtValue) -> torch.Tensor:
    """A copy of a session's output as a tensor."""
    if result.element_type() != TensorProto.BFLOAT16:
        return torch.from_numpy(result.numpy().copy())
    return torch.from_dlpack(result._ortvalue).clone()


def run(session: onnxruntime.InferenceSession, feeds: Tensors) -> torch.Tensor:
    """Output y for these inputs; those that the graph does not ask for are left out."""
    asked = {item.name for item in session.get_inputs()}
    values = {name: value(tensor) for name, tensor in feeds.items() if name in asked}
    return tensor_of(session.run_with_ort_values(["y"], values)[0])
