"""Counts the memory of training steps: tensors by storage, and every allocation of torch's.

The profiler sees each block that torch's CPU allocator hands out and takes back, so that a peak is
a count and not a reading of the resident set: the same in every run, on a busy machine as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import feinwerk
from feinwerk import _native


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    sizes = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers on this rank."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors of all states on this rank."""
    total = 0
    for state in optimizer.state.values():
        for tensor in state.values():
            total += (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes
    return total


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that was allocated at once in a call, beside what was there before it."""
    _native._scratch.buffer = None  # the call allocates the workspace that it needs itself
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = highest = 0
    for event in events:
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def saved_bytes(call: Callable[[], torch.Tensor], owned: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward of what a call returns."""
    before = {tensor.untyped_storage()._cdata for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in before:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()  # nothing that is saved is freed before it returns, so that no key comes twice
    return sum(kept.values())


def causal_model(kind: str, method: str, dtype: str, attention: str, r: int, **sizes: Any) -> Any:
    """A random model of transformers, brought into the form in which `method` trains it."""
    import transformers

    defaults = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "use_cache": False, "pad_token_id": 0, "attn_implementation": attention,
    }  # fmt: skip
    if kind == "Qwen3":
        defaults["head_dim"] = 32
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(defaults | sizes))
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=getattr(torch, dtype))
    if method == "full":
        return model.train()
    return adapted(model, method, r)


def adapted(model: Any, method: str, r: int, *, peft: bool = True, **options: Any) -> Any:
    """The model with Feinwerk's adapters, in PEFT's layers or in its own, over NF4 or not."""
    model.requires_grad_(False)
    if method.startswith("q"):
        feinwerk.quantize_model(model, skip=("lm_head",))
    dora = method.endswith("dora")
    if not peft:
        from feinwerk.nn import add_adapters

        names = [n for n, m in model.named_modules() if "proj" in n.rpartition(".")[2]]
        leaves = sorted({name.rpartition(".")[2] for name in names})
        add_adapters(model, r, lora_alpha=8, dora=dora, target_modules=leaves, **options)
        return model.train()
    from peft import LoraConfig, get_peft_model

    from feinwerk.integrations.peft import fuse

    settings = {"target_modules": "all-linear", **options}
    wrapped = get_peft_model(
        model, LoraConfig(r=r, lora_alpha=8, task_type="CAUSAL_LM", use_dora=dora, **settings)
    )
    fuse(wrapped)
    return wrapped.train()


def tokens_of(model: Any, batch: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, seq), generator=generator)


def training_steps(
    model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, count: int = 2
) -> Callable[[], None]:
    """Steps as a training loop takes them."""

    def run() -> None:
        for _ in range(count):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run
