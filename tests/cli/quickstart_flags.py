"""Command lines of a quickstart that takes seconds, for the tests."""

from __future__ import annotations


def arguments(tiny_model, questions, output, *, onnx=False, **options):
    given = {"model": tiny_model, "dataset": questions, "output": output}
    given |= {"steps": 6, "batch_size": 4, "held_out": 6, "rank": 4, "lora_alpha": 8}
    given |= {"dtype": "float32", "checkpoint_every": 2, "threads": 1, **options}
    flags = []
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    if not onnx:
        flags.append("--no-onnx")
    return ["quickstart", *flags, "--quiet"]
