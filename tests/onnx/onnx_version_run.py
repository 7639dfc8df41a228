"""Runs stored models in this process's onnxruntime: onnx_version_run.py LIBRARY FOLDER.

FOLDER holds <name>.onnx with <name>.npz: the inputs, and y as it must be, bit by bit. Every model
takes and gives float32 or integers, so that NumPy can hold them whatever the version.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

library, folder = sys.argv[1], Path(sys.argv[2])
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 2
options.register_custom_ops_library(library)
options.register_custom_ops_library(library)
for path in sorted(folder.glob("*.onnx")):
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    stored = dict(np.load(path.with_suffix(".npz")))
    want = stored.pop("y")
    [y] = session.run(["y"], stored)
    if y.tobytes() != want.tobytes() or y.shape != want.shape:
        sys.exit(f"{path.stem}: {np.abs(y - want).max()} off in {onnxruntime.__version__}")
    print(path.stem, session.get_outputs()[0].shape)
print(onnxruntime.__version__)
