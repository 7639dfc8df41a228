"""The peers on a GPU: dense products, bitsandbytes' kernels, PEFT's layers over the same bytes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.timing import Contender
from benchmarks.peers import SANE_ERROR, Unsupported, optional
from feinwerk import NF4Weight

Calls = Sequence[Callable[[], object]]


def same(contender: Contender, actual: torch.Tensor, expected: torch.Tensor) -> Contender:
    """The contender, unless it computes another thing: a wrong result has no speed."""
    wide = expected.detach().float()
    error = float((actual.detach().float() - wide).norm() / wide.norm())
    if not error < SANE_ERROR:
        raise Unsupported(f"wrong result: relative error {error:.2g}")
    return contender


def dense(name: str, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> Contender:
    """F.linear with weights held in x's dtype; transposed ones for the gradient."""
    return Contender(name, [functools.partial(F.linear, x, w) for w in weights])


def unfused(name: str, x: torch.Tensor, weights: Sequence[NF4Weight]) -> Contender:
    """Our own dequantize into a fresh full copy, then F.linear."""
    calls = [lambda w=w: F.linear(x, w.dequantize(x.dtype)) for w in weights]
    return Contender(name, calls)


def quant_state(weight: NF4Weight) -> tuple[torch.Tensor, Any]:
    """(packed, bitsandbytes' QuantState) over the same bytes."""
    functional = optional("bitsandbytes.functional")
    entries = weight.to_bitsandbytes()
    packed = entries.pop("weight")
    state = functional.QuantState.from_dict(
        {key.removeprefix("weight."): value for key, value in entries.items()}, weight.device
    )
    return packed.view(-1, 1), state


def bnb_linear(
    name: str, x: torch.Tensor, weights: Sequence[NF4Weight], expected: torch.Tensor
) -> Contender:
    """bitsandbytes.matmul_4bit as its Linear4bit calls it, without gradients."""
    bnb = optional("bitsandbytes")
    parts = [quant_state(w) for w in weights]
    calls = [
        functools.partial(bnb.matmul_4bit, x, packed.t(), quant_state=state)
        for packed, state in parts
    ]
    return same(Contender(name, calls), calls[0](), expected)


def bnb_dequantize(name: str, weights: Sequence[NF4Weight], expected: torch.Tensor) -> Contender:
    """dequantize_4bit of a double-quantized weight."""
    functional = optional("bitsandbytes.functional")
    parts = [quant_state(w) for w in weights]
    calls = [functools.partial(functional.dequantize_4bit, *part) for part in parts]
    return same(Contender(name, calls), calls[0](), expected)


def bnb_quantize(name: str, weights: Sequence[torch.Tensor]) -> Contender:
    """quantize_4bit without double quantization, as ours is timed; it copies from the host."""
    functional = optional("bitsandbytes.functional")
    quantize = functools.partial(functional.quantize_4bit, blocksize=64, quant_type="nf4")
    calls = [functools.partial(quantize, w) for w in weights]
    calls[0]()
    return Contender(name, calls, graph=False)


def linear4bit(weight: NF4Weight) -> torch.nn.Module:
    """Bitsandbytes' layer over a copy of the weight's bytes."""
    bnb = optional("bitsandbytes")
    packed, state = quant_state(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: torch.nn.Module = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype,
            quant_type="nf4", device="meta",
        )  # fmt: skip
    module.weight = bnb.nn.Params4bit(
        packed.clone(), requires_grad=False, quant_state=state, bnb_quantized=True,
        quant_type="nf4", module=module,
    )  # fmt: skip
    return module


def linear(weight: torch.Tensor) -> torch.nn.Module:
    """A frozen dense layer."""
    N, K = weight.shape
    with torch.device("meta"):
        module = torch.nn.Linear(K, N, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def timed(
    missing: dict[str, str], wanted: bool, make: Callable[[], Contender], name: str
) -> list[Contender]:
    """The contender if it is wanted and can be had; where it cannot, `missing` says why."""
    if not wanted:
        return []
    try:
        return [make()]
    except Exception as error:
        lines = str(error).splitlines() or [""]
        missing[name] = f"{type(error).__name__}: {lines[0][:120]}"
        return []
