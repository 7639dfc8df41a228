"""Trains SmolLM2-135M for a few steps in a process of its own, and prints the bytes that it took.

python -m tests.plan.smollm2_process qdora bfloat16 2 128      prints JSON
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.memory import growth
from feinwerk.cli.model import find_model, load_model, quiet_libraries
from feinwerk.optim import AdamW
from tests.plan import memory_meter


def measured(method: str, dtype: str, batch: int, seq: int) -> dict[str, int]:
    """Bytes of model and states, and the peak of a step: as allocated, and as resident."""
    model, _ = load_model(find_model("smollm2"), cache=True)
    model.config._attn_implementation = "sdpa"
    for parameter in model.parameters():  # rotary tables stay fp32, as from_pretrained has them
        parameter.data = parameter.data.to(getattr(torch, dtype))
    if method == "full":
        model.requires_grad_(True).train()
    else:
        model = memory_meter.adapted(model, method, 16)
    tokens = memory_meter.tokens_of(model, batch, seq)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    first = memory_meter.peak_bytes(memory_meter.training_steps(model, optimizer, tokens, 2))
    held = memory_meter.model_bytes(model)
    states = memory_meter.state_bytes(optimizer)
    step = memory_meter.training_steps(model, optimizer, tokens, 1)
    grown, _ = growth(step)
    return {"model": held, "states": states, "peak": held + first, "resident_growth": grown}


if __name__ == "__main__":
    quiet_libraries()
    torch.set_num_threads(1)
    chosen, precision, *shape = sys.argv[1:]
    print(json.dumps(measured(chosen, precision, *map(int, shape))))
