"""Every rejection of the ops by its message, on real tensors and on fakes alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import feinwerk
from feinwerk import testing
from feinwerk.codebook import dynamic_map

N, K = 6, 96
WEIGHT = testing.make_weight(N, K)
NESTED = testing.make_weight(N, K, double_quant=True)

PLAIN = {"packed": WEIGHT.packed, "absmax": WEIGHT.absmax, "N": N, "K": K}
DOUBLE = {
    "packed": NESTED.packed,
    "absmax": NESTED.absmax,
    "nested_absmax": NESTED.nested[0],
    "nested_codebook": NESTED.nested[1],
    "nested_offset": NESTED.nested[2],
    "N": N,
    "K": K,
}
BASE: dict[str, dict[str, Any]] = {
    "nf4_quantize": {"weight": torch.ones(N, K)},
    "nf4_dequantize": {"packed": WEIGHT.packed, "absmax": WEIGHT.absmax, "shape": (N, K)},
    "nf4_linear": {"x": torch.ones(2, K), **PLAIN},
    "nf4_linear_backward": {"grad_y": torch.ones(2, N), **PLAIN},
    "nf4_embedding": {"indices": torch.tensor([1, 2]), **PLAIN},
    "blockwise_quantize": {"x": torch.ones(300), "codebook": dynamic_map()},
    "blockwise_dequantize": {
        "codes": torch.zeros(300, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "codebook": dynamic_map(),
    },
}
FLOATS = "be torch.float32, torch.bfloat16 or torch.float16"
SIZES = "be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"

# (op, changed arguments, exception, the message after "<op>: ")
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("nf4_quantize", {"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
    (
        "nf4_quantize",
        {"weight": torch.ones(4, dtype=torch.float64)},
        TypeError,
        f"weight must {FLOATS}, got torch.float64",
    ),
    (
        "nf4_quantize",
        {"weight": torch.ones(0, 4)},
        ValueError,
        "weight must have at least one element, got (0, 4)",
    ),
    ("nf4_quantize", {"blocksize": 48}, ValueError, f"blocksize must {SIZES}, got 48"),
    ("nf4_quantize", {"blocksize": 0}, ValueError, f"blocksize must {SIZES}, got 0"),
    ("nf4_quantize", {"rule": "gpu"}, ValueError, 'rule must be "cpu" or "cuda", got \'gpu\''),
    ("nf4_dequantize", {"packed": 3}, TypeError, "packed must be a torch.Tensor, got int"),
    ("nf4_dequantize", {"absmax": None}, TypeError, "absmax must be a torch.Tensor, got NoneType"),
    ("nf4_dequantize", {"shape": (0, 4)}, ValueError, "shape must be at least 1, got 0"),
    ("nf4_dequantize", {"shape": (-6, -96)}, ValueError, "shape must be at least 1, got -6"),
    ("nf4_dequantize", {"shape": (6, 97)}, ValueError, "packed must have 291 elements, got 288"),
    (
        "nf4_dequantize",
        {"dtype": torch.float64},
        TypeError,
        f"dtype must {FLOATS}, got torch.float64",
    ),
    ("nf4_linear", {"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
    ("nf4_linear", {"N": 0}, ValueError, "N must be at least 1, got 0"),
    ("nf4_linear", {"K": -1}, ValueError, "K must be at least 1, got -1"),
    (
        "nf4_linear",
        {"x": torch.ones(2, K, dtype=torch.int64)},
        TypeError,
        f"x must {FLOATS}, got torch.int64",
    ),
    (
        "nf4_linear",
        {"x": torch.ones(2, 95)},
        ValueError,
        "x must have last dimension K = 96, got (2, 95)",
    ),
    ("nf4_linear", {"x": torch.tensor(1.0)}, ValueError, "x must have 1 to 4 dimensions, got 0"),
    (
        "nf4_linear",
        {"x": torch.ones(1, 1, 1, 1, K)},
        ValueError,
        "x must have 1 to 4 dimensions, got 5",
    ),
    ("nf4_linear", {"bias": torch.ones(5)}, ValueError, "bias must have shape (6,), got (5,)"),
    ("nf4_linear", {"bias": torch.ones(6, 1)}, ValueError, "bias must have shape (6,), got (6, 1)"),
    (
        "nf4_linear",
        {"bias": torch.ones(6, dtype=torch.int32)},
        TypeError,
        f"bias must {FLOATS}, got torch.int32",
    ),
    (
        "nf4_linear",
        {"compute": "int4"},
        ValueError,
        'compute must be "exact" or "int8", got \'int4\'',
    ),
    (
        "nf4_linear_backward",
        {"grad_y": torch.ones(2, 5)},
        ValueError,
        "grad_y must have last dimension N = 6, got (2, 5)",
    ),
    ("nf4_linear_backward", {"grad_y": 1}, TypeError, "grad_y must be a torch.Tensor, got int"),
    ("nf4_embedding", {"indices": [1]}, TypeError, "indices must be a torch.Tensor, got list"),
    (
        "nf4_embedding",
        {"indices": torch.ones(2)},
        TypeError,
        "indices must be torch.int64 or torch.int32, got torch.float32",
    ),
    (
        "nf4_embedding",
        {"dtype": torch.int8},
        TypeError,
        f"dtype must {FLOATS}, got torch.int8",
    ),
    ("blockwise_quantize", {"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
    (
        "blockwise_quantize",
        {"x": torch.ones(3).bfloat16()},
        TypeError,
        "x must be torch.float32, got torch.bfloat16",
    ),
    (
        "blockwise_quantize",
        {"x": torch.ones(0)},
        ValueError,
        "x must have at least one element, got (0,)",
    ),
    (
        "blockwise_quantize",
        {"codebook": torch.ones(16)},
        ValueError,
        "codebook must have 256 elements, got 16",
    ),
    ("blockwise_quantize", {"blocksize": 0}, ValueError, "blocksize must be at least 1, got 0"),
    (
        "blockwise_quantize",
        {"rule": ""},
        ValueError,
        'rule must be "cpu" or "cuda", got \'\'',
    ),
    (
        "blockwise_dequantize",
        {"codes": torch.zeros(300)},
        TypeError,
        "codes must be torch.uint8, got torch.float32",
    ),
    (
        "blockwise_dequantize",
        {"codes": torch.zeros(0, dtype=torch.uint8)},
        ValueError,
        "codes must have at least one element, got (0,)",
    ),
    (
        "blockwise_dequantize",
        {"absmax": torch.ones(3)},
        ValueError,
        "absmax must have 2 elements, got 3",
    ),
    ("blockwise_dequantize", {"blocksize": -1}, ValueError, "blocksize must be at least 1, got -1"),
    (
        "blockwise_dequantize",
        {"codebook": dynamic_map().double()},
        TypeError,
        "codebook must be torch.float32, got torch.float64",
    ),
    (
        "blockwise_dequantize",
        {"offset": torch.ones(1)},
        ValueError,
        "offset must be a 0-dim tensor, got 1 dimensions",
    ),
    (
        "blockwise_dequantize",
        {"offset": torch.tensor(1.0).double()},
        TypeError,
        "offset must be torch.float32, got torch.float64",
    ),
]

# The rules that every op with an NF4 weight shares.
WITH_WEIGHT = ("nf4_dequantize", "nf4_linear", "nf4_linear_backward", "nf4_embedding")
PLAIN_CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"blocksize": 65}, ValueError, f"blocksize must {SIZES}, got 65"),
    ({"blocksize": 128}, ValueError, "absmax must have 5 elements, got 9"),
    ({"packed": WEIGHT.packed.int()}, TypeError, "packed must be torch.uint8, got torch.int32"),
    ({"packed": WEIGHT.packed[:-1]}, ValueError, "packed must have 288 elements, got 287"),
    (
        {"packed": WEIGHT.packed.repeat(2)[::2]},
        ValueError,
        "packed must be contiguous, got strides (2,)",
    ),
    (
        {"absmax": WEIGHT.absmax.half()},
        TypeError,
        "absmax must be torch.float32, got torch.float16",
    ),
    ({"absmax": torch.ones(10)}, ValueError, "absmax must have 9 elements, got 10"),
    (
        {"absmax": NESTED.absmax},
        TypeError,
        "absmax must be torch.float32, or torch.uint8 with nested_absmax, nested_codebook and "
        "nested_offset, got torch.uint8 without them",
    ),
]
NESTED_CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"nested_offset": None},
        ValueError,
        "nested_offset must be given together with the other nested tensors, or none of the three, "
        "got None",
    ),
    (
        {"nested_absmax": None, "nested_codebook": None},
        ValueError,
        "nested_absmax, nested_codebook must be given together with the other nested tensors, "
        "or none of the three, got None",
    ),
    ({"absmax": WEIGHT.absmax}, TypeError, "absmax must be torch.uint8, got torch.float32"),
    (
        {"nested_absmax": torch.ones(2)},
        ValueError,
        "nested_absmax must have 1 elements, got 2",
    ),
    (
        {"nested_codebook": torch.ones(16)},
        ValueError,
        "nested_codebook must have 256 elements, got 16",
    ),
    (
        {"nested_codebook": dynamic_map().half()},
        TypeError,
        "nested_codebook must be torch.float32, got torch.float16",
    ),
    (
        {"nested_offset": torch.ones(1)},
        ValueError,
        "nested_offset must be a 0-dim tensor, got 1 dimensions",
    ),
    (
        {"nested_offset": torch.tensor(1, dtype=torch.int64)},
        TypeError,
        "nested_offset must be torch.float32, got torch.int64",
    ),
]
for _op in WITH_WEIGHT:
    CASES += [(_op, *case) for case in PLAIN_CASES]
    _sizes = {"N", "K"} & BASE[_op].keys()
    _double = {k: v for k, v in DOUBLE.items() if k not in ("N", "K") or k in _sizes}
    CASES += [(_op, {**_double, **change}, *rest) for change, *rest in NESTED_CASES]


def ids(case: Any) -> str | None:
    return case if isinstance(case, str) else None


def moved(value: Any, device: str) -> Any:
    if not isinstance(value, torch.Tensor) or device == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "change", "error", "message"), CASES, ids=ids)
def test_rejected(
    op: str, change: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    arguments = {k: moved(v, device) for k, v in {**BASE[op], **change}.items()}
    with pytest.raises(error, match=f"^{re.escape(f'{op}: {message}')}$"):
        getattr(feinwerk, op)(**arguments)


@pytest.mark.parametrize("op", BASE)
def test_the_base_case_is_accepted(op: str) -> None:
    getattr(feinwerk, op)(**BASE[op])
    getattr(feinwerk, op)(**{k: moved(v, "meta") for k, v in BASE[op].items()})


@pytest.mark.parametrize("op", BASE)
def test_tensors_on_two_devices(op: str) -> None:
    _, *others = (k for k, v in BASE[op].items() if isinstance(v, torch.Tensor))
    if op in WITH_WEIGHT:
        arguments = {**BASE[op], **{k: v for k, v in DOUBLE.items() if k in DOUBLE and k != "N"}}
        arguments = {k: v for k, v in arguments.items() if k != "K" or "K" in BASE[op]}
        others += ["nested_absmax", "nested_codebook", "nested_offset"]
    else:
        arguments = dict(BASE[op])
    if op == "nf4_linear":
        arguments["bias"] = torch.ones(N)
        others.append("bias")
    for name in others:
        changed = {**arguments, name: arguments[name].to("meta")}
        with pytest.raises(
            ValueError, match=f"^{op}: {name} must be on cpu like the other tensors"
        ):
            getattr(feinwerk, op)(**changed)


def test_the_check_runs_in_front_of_the_registered_op() -> None:
    with pytest.raises(ValueError, match="nf4_linear: packed must have 288 elements"):
        torch.ops.feinwerk.nf4_linear(torch.ones(2, K), WEIGHT.packed[:5], WEIGHT.absmax, N=N, K=K)


def test_a_rejection_under_compile_keeps_its_message() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(WEIGHT.linear, backend="aot_eager")
    with pytest.raises(Exception, match="nf4_linear: x must have last dimension K = 96"):
        compiled(torch.ones(2, 95))
