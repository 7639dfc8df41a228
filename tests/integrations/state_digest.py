"""A digest of an optimizer's states, for runs on other numbers of ranks to compare."""

from __future__ import annotations

import hashlib

import torch


def digest(optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of the states, whole, in the order of the parameters."""
    found = hashlib.sha256()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in sorted(optimizer.state[parameter].items()):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                found.update(f"{key} {whole.dtype} {tuple(whole.shape)}".encode())
                found.update(whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
