"""PEFT over bitsandbytes' Linear4bit, as a QLoRA user trains it: the adapters' peer.

Built from the same bytes and the same adapters as ours, in training mode: in eval mode without
gradients bitsandbytes repacks the weight for a bf16 kernel, which is what `eval` in a name says.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import adapters, peers
from benchmarks.adapters import RANK, SCALING, Adapter, AdapterProblem
from benchmarks.harness import Candidate
from benchmarks.problem import nf4_weight

NAME = "PEFT + bitsandbytes"


def linear4bit(N: int, K: int, dtype: torch.dtype) -> torch.nn.Module:
    """The base of a QLoRA layer, NF4 with double quantization, on a copy of the problem's bytes."""
    bnb = peers.optional("bitsandbytes")
    packed, state = peers.quant_state(nf4_weight(N, K, adapters.BLOCKSIZE).to(dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: torch.nn.Module = bnb.nn.Linear4bit(
            K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
    module.weight = bnb.nn.Params4bit(
        packed.clone(), requires_grad=False, quant_state=state, bnb_quantized=True,
        quant_type="nf4", module=module,
    )  # fmt: skip
    return module


class _Holder(torch.nn.Module):
    """What get_peft_model needs around one layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit = True  # as transformers marks its models: PEFT looks for it


def lora_layer(
    base: torch.nn.Module, made: Sequence[Adapter], *, adapter_dtype: torch.dtype = torch.float32
) -> Any:
    """PEFT's own layer around `base`, with these adapters under the names 0, 1, 2 ..."""
    peft = peers.optional("peft")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["layer"],
        use_dora=made[0].magnitude is not None,
    )  # fmt: skip
    model = peft.get_peft_model(_Holder(base), config, adapter_name="0")
    for i in range(1, len(made)):
        model.add_adapter(str(i), config)
    layer = model.base_model.model.layer
    if type(layer).__module__.partition(".")[0] != "peft":
        raise peers.Unsupported(f"not PEFT's own layer: {type(layer).__name__}")
    for i, adapter in enumerate(made):
        for mine, theirs in zip(adapter.tensors, trained(layer, str(i)), strict=True):
            theirs.data = mine.detach().to(adapter_dtype, copy=True)
    return layer.train()


def trained(layer: Any, name: str) -> list[torch.Tensor]:
    """The parameters of one adapter."""
    found = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    if name in layer.lora_magnitude_vector:
        found.append(layer.lora_magnitude_vector[name].weight)
    return found


def same(
    candidate: Candidate, results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Candidate:
    """The candidate, if it computes what ours does, every gradient included."""
    for actual, other in zip(results, expected, strict=True):
        peers.sane(candidate, actual.detach(), other.detach())
    return candidate


def unchecked_layer(problem: AdapterProblem, *, half: bool = False) -> Candidate:
    """One adapter: a step as in training, or the forward of a model in eval mode.

    Args:
        problem: what is computed.
        half: with adapters in the activations' dtype (autocast_adapter_dtype=False); by default
            PEFT holds them in fp32.
    """
    name = NAME if problem.backward else f"{NAME} eval"
    adapter_dtype = problem.dtype if half else torch.float32
    layers = []
    for _ in range(problem.copies):
        base = linear4bit(problem.N, problem.K, problem.dtype)
        module = lora_layer(base, problem.adapters(), adapter_dtype=adapter_dtype)
        layers.append((module.train(problem.backward), trained(module, "0")))
    return problem.candidate(f"{name} bf16 adapters" if half else name, layers)


def layer(
    problem: AdapterProblem, expected: Sequence[torch.Tensor], *, half: bool = False
) -> Candidate:
    """The same, its results compared with ours."""
    candidate = unchecked_layer(problem, half=half)
    return same(candidate, candidate.calls[0](), expected)


def mixed_batch(problem: AdapterProblem, expected: Sequence[torch.Tensor]) -> Candidate:
    """PEFT's mixed batch (adapter_names), which exists in eval mode only."""
    names = [str(i) for i in range(problem.count)]
    layers = []
    for _ in range(problem.copies):
        base = linear4bit(problem.N, problem.K, problem.dtype)
        module = lora_layer(base, problem.adapters()).eval()
        layers.append((functools.partial(module, adapter_names=names), ()))
    candidate = problem.candidate(f"{NAME} eval", layers)
    return same(candidate, candidate.calls[0](), expected)


def one_by_one(problem: AdapterProblem, expected: Sequence[torch.Tensor]) -> Candidate:
    """A step for each adapter in turn, each with its rows: what PEFT users do to train many."""
    base = linear4bit(problem.N, problem.K, problem.dtype)
    made = problem.adapters()
    module = lora_layer(base, made)
    x, dy = problem.x(), problem.grad_y()
    names = [str(i) for i in range(problem.count)]
    rows = [(x[i].clone().requires_grad_(), dy[i]) for i in range(problem.count)]

    def call() -> list[tuple[torch.Tensor, ...]]:
        results = []
        for name, (leaf, grad) in zip(names, rows, strict=True):
            module.set_adapter(name)
            results.append(adapters.step(module, leaf, grad, trained(module, name)))
        return results

    candidate = Candidate(f"{NAME}, one by one", [call])
    return same(candidate, joined(call()), expected)


def joined(runs: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Results of single runs in the order of grouped ones: y and dX stacked, then the adapters'."""
    y, dx = (torch.stack([run[at] for run in runs]) for at in (0, 1))
    return [y, dx, *(gradient for run in runs for gradient in run[2:])]


def norm_call(base: torch.nn.Module, made: Adapter) -> Callable[[], torch.Tensor]:
    """The norm that PEFT's DoRA layer takes in every training forward, by its own methods."""
    integrations = peers.optional("peft.utils.integrations")
    module = lora_layer(base, [made])
    A, B, dora = module.lora_A["0"], module.lora_B["0"], module.lora_magnitude_vector["0"]

    def call() -> torch.Tensor:
        product = dora.get_lora_weight(lora_A=A, lora_B=B, adapter_name="0").detach()
        weight = integrations.dequantize_module_weight(module.base_layer).to(product.dtype)
        norm: torch.Tensor = dora.get_weight_norm(weight, product, SCALING, adapter_name="0")
        return norm.detach()

    return call


def weight_norm(base: torch.nn.Module, made: Adapter, expected: torch.Tensor) -> Candidate:
    """The norm as a candidate, its result compared with ours."""
    call = norm_call(base, made)
    return peers.sane(Candidate(NAME, [call]), call(), expected)
