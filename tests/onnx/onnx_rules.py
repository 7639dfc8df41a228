"""The oracle of malformed ONNX nodes: what breaks a rule, and what a well-formed node must give.

Written from the operations' specification, not from the library, and shared by the listed cases
and the fuzzer.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from onnx_specs import ACTIVATIONS, INPUTS, LOW_RANK, NESTED, REQUIRED, TORCH_TYPES, Spec

import feinwerk
from feinwerk.codebook import BLOCKSIZES, NESTED_BLOCKSIZE

# No weight of a test has as many elements; a size beyond it fits no buffer.
LARGEST = 2**40


def offenders(spec: Spec) -> set[str]:
    """The attributes and inputs that break a rule; of one broken relation both sides."""
    missing = {name for name in INPUTS[spec.op][: REQUIRED[spec.op]] if name not in spec.inputs}
    if missing:
        return missing
    wrong = _wrong_types(spec)
    if spec.op == "LoraLinear":
        weight = spec.inputs["weight"]
        if weight.dim() != 2:
            return wrong | {"weight"}
        N, K = weight.shape
        wrong |= {"weight"} if N == 0 or K == 0 else set()
    else:
        attributes = _wrong_attributes(spec)
        if attributes:
            return wrong | attributes
        N, K = spec.attributes["N"], spec.attributes["K"]
        wrong |= _wrong_weight(spec, N, K)
    if spec.op == "NF4Embedding":
        indices = spec.inputs["indices"]
        if indices.dtype is torch.int64 and ((indices < 0) | (indices >= N)).any():
            wrong |= {"indices"}
        return wrong
    x = spec.inputs["x"]
    if x.dim() == 0 or x.shape[-1] != K:
        wrong |= {"x"}
    # An optional vector of no elements is one that is absent.
    if "bias" in spec.inputs and tuple(spec.inputs["bias"].shape) not in {(0,), (N,)}:
        wrong |= {"bias"}
    return wrong | (_wrong_adapter(spec, N, K) if "lora_A" in spec.inputs else set())


def _wrong_types(spec: Spec) -> set[str]:
    first = spec.first
    allowed: dict[str, tuple[torch.dtype, ...]] = {
        "x": ACTIVATIONS,
        "indices": (torch.int64,),
        "packed": (torch.uint8,),
        "absmax": (torch.float32, torch.uint8),
        "weight": (first.dtype,) if first is not None else ACTIVATIONS,
        "bias": (first.dtype,) if first is not None else ACTIVATIONS,
    }
    return {
        name
        for name, value in spec.inputs.items()
        if value.dtype not in allowed.get(name, (torch.float32,))
    }


def _wrong_attributes(spec: Spec) -> set[str]:
    wrong = set()
    for name in ("N", "K"):
        value = spec.attributes.get(name)
        if not isinstance(value, int) or not 1 <= value < LARGEST:
            wrong.add(name)
    if not wrong and spec.attributes["N"] * spec.attributes["K"] >= LARGEST:
        wrong |= {"N", "K", "packed"}
    choices: dict[str, tuple[int, ...]] = {"block_size": BLOCKSIZES}
    if spec.op == "NF4Embedding":
        choices["to"] = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for name, allowed in choices.items():
        value = spec.attributes.get(name, allowed[0])
        if not isinstance(value, int) or value not in allowed:
            wrong.add(name)
    return wrong


def _wrong_weight(spec: Spec, N: int, K: int) -> set[str]:
    blocks = -(-N * K // spec.attributes.get("block_size", 64))
    wrong = set()
    if spec.inputs["packed"].numel() != (N * K + 1) // 2:
        wrong.add("packed")
    absmax = spec.inputs["absmax"]
    if absmax.numel() != blocks:
        wrong.add("absmax")
    nested = [name for name in NESTED if name in spec.inputs]
    if absmax.dtype is not torch.uint8:
        # Beside fp32 a table of no elements is one that is absent.
        filled = any(spec.inputs[name].numel() for name in nested)
        return wrong | ({"absmax", *NESTED} if filled else set())
    if len(nested) < len(NESTED):
        wrong |= {"absmax", *NESTED}
    counts = (-(-blocks // NESTED_BLOCKSIZE), 256, 1)
    for name, count in zip(NESTED, counts, strict=True):
        if name in spec.inputs and spec.inputs[name].numel() != count:
            wrong.add(name)
    return wrong


def _wrong_adapter(spec: Spec, N: int, K: int) -> set[str]:
    wrong = set()
    lora_A, lora_B = spec.inputs["lora_A"], spec.inputs["lora_B"]
    if lora_A.dim() != 2 or lora_A.shape[-1] != K:
        wrong.add("lora_A")
    if lora_B.dim() != 2 or lora_B.shape[0] != N:
        wrong.add("lora_B")
    if not wrong and lora_A.shape[0] != lora_B.shape[1]:
        wrong |= {"lora_A", "lora_B"}
    if spec.inputs["scaling"].numel() != 1:
        wrong.add("scaling")
    if "gain" in spec.inputs and tuple(spec.inputs["gain"].shape) not in {(0,), (N,)}:
        wrong.add("gain")
    return wrong


def expected(spec: Spec) -> torch.Tensor:
    """What Feinwerk's Python operation gives for a spec without offenders."""
    given = spec.inputs
    if spec.op == "LoraLinear":
        N, K = given["weight"].shape
        tables: tuple[Any, ...] = (None,) * 4
        sizes: dict[str, int] = {}
    else:
        N, K = spec.attributes["N"], spec.attributes["K"]
        nested: list[torch.Tensor | None] = [None] * len(NESTED)
        if given["absmax"].dtype is torch.uint8:
            nested = [given[name].reshape(-1) for name in NESTED]
            nested[2] = given["nested_offset"].reshape(())
        tables = (given["absmax"], *nested)
        sizes = {"blocksize": spec.attributes.get("block_size", 64)}
    if spec.op == "NF4Embedding":
        dtype = TORCH_TYPES[spec.attributes.get("to", TensorProto.FLOAT)]
        return feinwerk.nf4_embedding(
            given["indices"], given["packed"], *tables, N=N, K=K, dtype=dtype, **sizes
        )
    x = given["x"].reshape(-1, K)
    y = _rows(spec, x, N, K, tables, sizes)
    return y.reshape(*given["x"].shape[:-1], N)


def _rows(
    spec: Spec,
    x: torch.Tensor,
    N: int,
    K: int,
    tables: tuple[Any, ...],
    sizes: dict[str, int],
) -> torch.Tensor:
    given = spec.inputs
    optional = (given.get("bias"), given.get("gain"))
    bias, gain = (value if value is not None and value.numel() else None for value in optional)
    weight = given["weight"] if spec.op == "LoraLinear" else given["packed"]
    lora_A, lora_B, scaling = (given.get(name) for name in LOW_RANK)
    if lora_A is None or (lora_A.shape[0] == 0 and gain is None and spec.op != "LoraLinear"):
        return feinwerk.nf4_linear(x, weight, tables[0], bias, *tables[1:], N=N, K=K, **sizes)
    if lora_A.shape[0] == 0:  # the Python operations have no rank 0
        lora_A, lora_B, scaling = torch.zeros(1, K), torch.zeros(N, 1), torch.ones(())
    scaling = scaling.reshape(())
    if gain is None:
        return feinwerk.lora_linear(
            x, weight, lora_A, lora_B, bias, None, *tables, scaling=scaling, **sizes
        )
    return feinwerk.dora_linear(
        x, weight, lora_A, lora_B, gain, bias, *tables,
        weight_norm=torch.ones(N), scaling=scaling, **sizes,
    )  # fmt: skip
