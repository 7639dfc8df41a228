"""How much the peak resident set grows while ONNX Runtime creates a session of NF4 layers.

A file of its own, as the measurement wants a fresh process: python -m benchmarks.onnx_memory OP.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

LAYERS, N, K, BLOCK = 8, 4096, 4096, 64


def peak_bytes() -> int:
    """The most memory that was resident since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the peak start again from what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


def write_model(path: Path, op: str) -> int:
    """A chain of layers whose weights lie in a file beside the model; returns their bytes."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    ours = op == "NF4Linear"
    extra = {} if ours else {"quant_type": 1}
    weights, body, value, packed_bytes = [], [], "x", 0
    for i in range(LAYERS):
        packed = rng.integers(0, 256, N * K // 2, dtype=np.uint8)
        absmax = rng.random(N * K // BLOCK, dtype=np.float32) / K
        packed_bytes += packed.nbytes + absmax.nbytes
        weights += [
            numpy_helper.from_array(packed, f"p{i}"),
            numpy_helper.from_array(absmax, f"a{i}"),
        ]
        inputs, domain = [value, f"p{i}", f"a{i}"], "feinwerk" if ours else "com.microsoft"
        value = f"y{i}"
        sizes = {"N": N, "K": K, "block_size": BLOCK, **extra}
        body.append(helper.make_node(op, inputs, [value], domain=domain, **sizes))
    feeds = [helper.make_tensor_value_info("x", 1, ["M", K])]
    results = [helper.make_tensor_value_info(value, 1, ["M", N])]
    graph = helper.make_graph(body, op, feeds, results, weights)
    opsets = [helper.make_opsetid(domain, 1) for domain in ("feinwerk", "com.microsoft")]
    opsets.append(helper.make_opsetid("", 17))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return packed_bytes


def main(op: str) -> None:
    """Print the growth at creation and after a run of one row, and what the weights are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        import subprocess

        # Written by another process, whose memory is not counted here.
        code = "import sys, pathlib; from benchmarks import onnx_memory as m; "
        code += "print(m.write_model(pathlib.Path(sys.argv[1]), sys.argv[2]))"
        written = subprocess.run(
            [sys.executable, "-c", code, str(path), op], stdout=subprocess.PIPE, check=True
        )
        import onnxruntime

        import feinwerk.onnx

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        feinwerk.onnx.register(options)
        providers = ["CPUExecutionProvider"]
        reset_peak()
        before = peak_bytes()
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        created = peak_bytes() - before
        session.run(None, {"x": np.ones((1, K), dtype=np.float32)})
        ran = peak_bytes() - before
    packed = int(written.stdout)
    print(json.dumps({"op": op, "packed": packed, "created": created, "ran": ran}))


if __name__ == "__main__":
    main(sys.argv[1])
