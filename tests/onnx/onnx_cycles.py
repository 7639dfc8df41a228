"""Creates, runs and destroys sessions over and over and tells what memory stays in use.

    python onnx_cycles.py LIBRARY CYCLES KIND...

A kind is "feinwerk" for a model of our operations, "standard" for one of ONNX's own, "leak" for
ours with the smallest possible leak in every eighth cycle, "runs" for runs of one session of ours,
and "options" for registration alone. Prints a line of JSON for each: by how many bytes the memory
that malloc has given out grew in each cycle, and the resident memory in all.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_specs import Spec, feed_of, make, model_of, node_of, options_with, to_ort

LEAK_EVERY = 8


class Mallinfo2(ctypes.Structure):
    """What glibc 2.33 and later tell of malloc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
libc.malloc.restype = ctypes.c_void_p


def in_use() -> int:
    """Bytes that malloc has given out and not got back."""
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    """Bytes of the process in memory, after malloc has returned what it can."""
    libc.malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ours() -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
    """All four operations in one graph, constant weights and adapters of the run."""
    linear, adapted = make("NF4Linear", N=70, bias=True), make("NF4LoraLinear", bias=True)
    dense, table = make("LoraLinear", N=5, K=6), make("NF4Embedding", K=70, double_quant=True)
    nodes, fixed = [], []
    inputs: dict[str, torch.Tensor] = {}
    for i, spec in enumerate((table, linear, adapted, dense)):
        node = node_of(spec)
        parts = {f"{name}_{i}": value for name, value in spec.inputs.items()}
        node.input[:] = [f"{name}_{i}" if name else "" for name in node.input]
        if i:
            node.input[0] = f"y_{i - 1}"
            del parts[f"x_{i}"]
        node.name, node.output[0] = f"node_{i}", "y" if i == 3 else f"y_{i}"
        nodes.append(node)
        inputs |= parts
        fixed += [name for name in parts if name.startswith(("packed", "absmax", "nested"))]
    whole = Spec("NF4Embedding", {}, inputs, frozenset(fixed), shapes="symbolic")
    return model_of(whole, nodes).SerializeToString(), feed_of(whole)


def standard() -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
    """Two products of ONNX's own."""
    spec = make("LoraLinear", N=70, K=70)
    x, weight = spec.inputs["x"], spec.inputs["weight"]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["z"]),
            helper.make_node("MatMul", ["z", "weight"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), {"x": to_ort(x)}


def once(kind: str, library: str) -> Callable[[], None]:
    """What a cycle of this kind does."""
    model, feed = standard() if kind == "standard" else ours()

    def open_one() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            model, options_with(library), providers=["CPUExecutionProvider"]
        )

    def create_run_destroy() -> None:
        session = open_one()
        for _ in range(2):
            session.run_with_ort_values(["y"], feed)

    kept = open_one()

    def run() -> None:
        kept.run_with_ort_values(["y"], feed)

    return {"runs": run, "options": lambda: options_with(library)}.get(kind, create_run_destroy)


def main(library: str, cycles: int, kind: str) -> None:
    cycle, growth, pages = once(kind, library), [0] * cycles, 0
    for i in range(-cycles // 4, cycles):  # the first ones warm up
        if i == 0:
            gc.collect()
            pages = resident()
        before = in_use()
        cycle()
        if kind == "leak" and i % LEAK_EVERY == 0:
            libc.malloc(1)
        if i >= 0:
            growth[i] = in_use() - before
    gc.collect()
    print(json.dumps({"growth": growth, "resident": resident() - pages}), flush=True)


if __name__ == "__main__":
    for name in sys.argv[3:]:
        main(sys.argv[1], int(sys.argv[2]), name)
