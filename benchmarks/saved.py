"""Bytes that autograd keeps for the backward of one training step: counted, not timed.

The model has SmolLM2-135M's shape with random weights, adapters of rank 16 on every linear layer of
the decoder and 128 tokens, in fp32. Counted are the storages that are alive after the forward,
each once: what was saved through autograd's hooks, and what a node keeps beside them in attributes
of its own. Not counted: the model's own tensors, and the quantized weights with their tables.

python -m benchmarks.saved          prints the count of every method, ours and the peer's
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import feinwerk
from benchmarks import peers, plan

TOKENS, RANK = 128, 16
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {},
    "QDoRA": {"use_dora": True},
    "QDoRA, dropout 0.05": {"use_dora": True, "lora_dropout": 0.05},
}
WHO = ("feinwerk", "PEFT + bitsandbytes")


class _Saved:
    """What autograd holds instead of a tensor; it dies with the node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], torch.Tensor], owned: Iterable[torch.Tensor]) -> int:
    """Return the bytes that are kept from a forward for its backward.

    Args:
        forward: computes the loss.
        owned: tensors that are there anyway and do not count.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        # Detached: an output that a node saves would hold that node, and neither would ever die.
        kept = _Saved(tensor.detach())
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = forward()
    gc.collect()
    tensors = [kept.tensor for kept in alive]
    tensors += [t for node in nodes(loss.grad_fn) for t in held(getattr(node, "__dict__", {}))]
    sizes = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
    for tensor in owned:
        sizes.pop(storage_key(tensor), None)
    return sum(sizes.values())


def storage_key(tensor: torch.Tensor) -> int:
    """What tells storages apart."""
    return tensor.untyped_storage().data_ptr()


def nodes(root: Any) -> Iterator[Any]:
    """Every node of the graph behind `root`."""
    seen, open_ = set(), [root]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [following for following, _ in node.next_functions]
            yield node


def held(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value: itself, or in the containers and objects that a node may hold."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from held(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from held(item)
    elif type(value).__name__ == "QuantState":
        yield from held(vars(value))


def owned_by(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and the tables of bitsandbytes' weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from held(getattr(tensor, "quant_state", None))


def llama() -> torch.nn.Module:
    """SmolLM2-135M's architecture, random and frozen."""
    transformers = peers.optional("transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model.requires_grad_(False)


def in_bitsandbytes(model: torch.nn.Module) -> torch.nn.Module:
    """Every linear layer but the head as Linear4bit, NF4 with double quantization."""
    bnb = peers.optional("bitsandbytes")
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        parent, _, leaf = name.rpartition(".")
        sizes = (module.in_features, module.out_features)
        new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = True  # as transformers marks it: PEFT looks for it
    return model


def quantized(who: str) -> torch.nn.Module:
    """The model in NF4, ours or bitsandbytes'."""
    model = llama()
    if who != "feinwerk":
        return in_bitsandbytes(model)
    feinwerk.quantize_model(model, skip=("lm_head",))
    return model


def count(who: str, method: str, base: torch.nn.Module) -> int:
    """Bytes saved for the backward of one step.

    Args:
        who: one of WHO: with ours, PEFT's layers are fused.
        method: one of METHODS.
        base: from quantized(who); it is left without adapters.
    """
    peft = peers.optional("peft")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM",
        **METHODS[method],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    if who == "feinwerk":
        from feinwerk.integrations.peft import fuse

        fuse(model)
    model.train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    found = saved_bytes(lambda: model(input_ids=tokens, labels=tokens).loss, owned_by(model))
    model.unload()
    return found


def records(
    run: str, configuration: plan.Configuration, isa: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of every method, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.saved", "--json"]
    environment = {**os.environ, **configuration.environment()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for method, found in json.loads(done.stdout.splitlines()[-1]).items():
        record = {
            "op": "saved",
            "what": method,
            "M": TOKENS,
            "isa": isa,
            "run": run,
            "bytes": found,
        }
        yield f"saved/{method}", record


def every() -> dict[str, dict[str, int]]:
    """Bytes by method and candidate."""
    bases = {who: quantized(who) for who in WHO}
    return {method: {who: count(who, method, bases[who]) for who in WHO} for method in METHODS}


if __name__ == "__main__":
    counts = every()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(counts))
    else:
        for method, found in counts.items():
            values = ", ".join(f"{who} {value / 1e6:.1f} MB" for who, value in found.items())
            print(f"{method}: {values}")
