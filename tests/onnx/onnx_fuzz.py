"""Random nodes, mostly a little wrong, against Python's operations; runs in a process of its own.

    python onnx_fuzz.py LIBRARY EXAMPLES [control]

A node without offenders must give the bits of Feinwerk's operation; one with some must be rejected
by ONNX Runtime in words that name the operation and one of them. Every node is printed before it
runs, so that the last line of a crash is the node that did it. `control` reads past the end of a
buffer on purpose, which a sanitized library must report.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import hypothesis
import numpy as np
import onnxruntime
import torch
from hypothesis import strategies as st
from onnx_rules import expected, offenders
from onnx_specs import (
    ACTIVATIONS,
    INPUTS,
    ONNX_TYPES,
    REQUIRED,
    Spec,
    make,
    model_of,
    run,
    same_bits,
    session_of,
)

from feinwerk.codebook import BLOCKSIZES

EDGES = (0, -1, 1, 2, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def resized(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape with the values of another, over and over."""
    count = int(np.prod(shape, dtype=np.int64))
    flat = value.reshape(-1) if value.numel() else torch.zeros(1, dtype=value.dtype)
    return flat.repeat(-(-max(count, 1) // flat.numel()))[:count].reshape(shape)


def wrong_attribute(draw: Callable, spec: Spec) -> Spec:
    name = draw(st.sampled_from(sorted({"N", "K", "block_size", *spec.attributes})))
    now = spec.attributes.get(name)
    near = now if isinstance(now, int) else 1
    value = draw(
        st.sampled_from(EDGES)
        | st.integers(max(near - 2, -(2**63)), min(near + 2, 2**63 - 1))
        | st.sampled_from(BLOCKSIZES)
        | st.sampled_from(["", "64", 64.0, [64, 64], [1.5], None])
    )
    return spec.having(**{name: value})


def wrong_shape(draw: Callable, spec: Spec) -> Spec:
    name = draw(st.sampled_from(sorted(spec.inputs)))
    value = spec.inputs[name]
    shape = list(value.shape)
    if shape and draw(st.booleans()):
        # Next to what is right.
        at = draw(st.integers(0, len(shape) - 1))
        shape[at] = max(0, shape[at] + draw(st.sampled_from([-1, 1])))
    else:
        shape = list(draw(SHAPES))
    return spec.but(**{name: resized(value, tuple(shape))})


def wrong_dtype(draw: Callable, spec: Spec) -> Spec:
    name = draw(st.sampled_from(sorted(spec.inputs)))
    dtype = draw(st.sampled_from(sorted(ONNX_TYPES, key=str)))
    return spec.but(**{name: spec.inputs[name].to(dtype)})


def without(draw: Callable, spec: Spec) -> Spec:
    name = draw(st.sampled_from(sorted(spec.inputs)))
    left = spec.but(**{name: None})
    return replace(left, constant=left.constant - {name})


def another(draw: Callable, spec: Spec) -> Spec:
    """One of the optional inputs, of a size that may be right."""
    name = draw(st.sampled_from(INPUTS[spec.op][REQUIRED[spec.op] :]))
    N = spec.attributes.get("N", 1)
    sizes = [1, 256, 0] + ([N] if isinstance(N, int) and 0 < N < 100 else [])
    return spec.but(**{name: torch.rand(draw(st.sampled_from(sizes)))})


def wrong_value(draw: Callable, spec: Spec) -> Spec:
    """An index out of range, or the largest code or a NaN where any value is allowed."""
    name = draw(st.sampled_from([n for n in ("indices", "packed", "absmax") if n in spec.inputs]))
    value = spec.inputs[name].clone()
    if value.numel():
        at = draw(st.integers(0, value.numel() - 1))
        if name == "indices":
            index = draw(st.sampled_from(EDGES))
            if value.dtype is torch.int64:
                value.view(-1)[at] = index
        elif value.dtype is torch.uint8:
            value.view(-1)[at] = 255
    return spec.but(**{name: value})


@st.composite
def specs(draw: Callable) -> Spec:
    """A well-formed node with none, one or two of its parts changed."""
    op = draw(st.sampled_from(sorted(INPUTS)))
    spec = make(
        op,
        N=draw(st.integers(1, 40)),
        K=draw(st.integers(1, 40) | st.sampled_from([64, 128, 192])),
        block_size=draw(st.sampled_from([32, 64, 128, 4096])),
        dtype=draw(st.sampled_from(ACTIVATIONS)),
        rows=draw(SHAPES),
        double_quant=op != "LoraLinear" and draw(st.booleans()),
        bias=op != "NF4Embedding" and draw(st.booleans()),
        r=draw(st.integers(0, 5)),
        gain=draw(st.booleans()),
    )
    spec = spec.fixed(*draw(st.sets(st.sampled_from(sorted(spec.inputs)))), "-")
    spec = spec.declared(draw(st.sampled_from(["open", "symbolic", "exact"])))
    changes = [wrong_shape, wrong_dtype, without, another]
    if op != "LoraLinear":
        changes += [wrong_attribute, wrong_attribute, wrong_value]
    for change in draw(st.lists(st.sampled_from(changes), max_size=2)):
        if spec.inputs:
            spec = change(draw, spec)
    return spec


def judge(spec: Spec, library: str, seen: Counter[str]) -> None:
    """Run one node and hold the outcome against the oracle's."""
    print(spec.describe(), flush=True)
    wrong, rejection = offenders(spec), None
    try:
        y = run(spec, library)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        rejection = f"{spec.describe()}\n{type(error).__name__}: {error}"
    if rejection is None:
        assert not wrong, f"{wrong} accepted: {spec.describe()}"
        assert same_bits(y, expected(spec)), f"other bits than Python's: {spec.describe()}"
        seen["works"] += 1
    else:
        assert wrong, f"a well-formed node was rejected: {rejection}"
        # ONNX Runtime's own words: of types that do not go together, of inputs that are absent.
        wrong.add("no kernel def matches node inputs")
        if not wrong <= spec.inputs.keys():
            wrong |= {"is marked single but has an empty string", "input size"}
        says = rejection.partition("\n")[2]
        assert spec.op in says, rejection
        assert re.search(rf"\b({'|'.join(wrong)})\b", says), f"{wrong} not told of: {rejection}"
        seen["rejected"] += 1


def fuzz(library: str, examples: int) -> Counter[str]:
    """Judge so many nodes."""
    seen: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(specs())
    def one(spec: Spec) -> None:
        judge(spec, library, seen)

    one()
    return seen


def control(library: str) -> None:
    """Say that x has 64 rows of 4 KiB and give it one."""
    spec = make("NF4Linear", N=4, K=1024, rows=(64,)).fixed()
    session = session_of(model_of(spec), library)
    row = np.zeros((1, 1024), dtype=np.float32)
    lie = np.lib.stride_tricks.as_strided(row, shape=(64, 1024), strides=(4096, 4))
    session.run_with_ort_values(["y"], {"x": onnxruntime.OrtValue.ortvalue_from_numpy(lie)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3:] == ["control"]:
        control(sys.argv[1])
    else:
        print("seen", dict(fuzz(sys.argv[1], int(sys.argv[2]))))
