"""How far a session's result may be from the fp64 truth: the budget of docs/numerics.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from feinwerk.testing import ulp


@torch.no_grad()
def truth_and_budget(
    peer: torch.Tensor, model: Any, last: nn.Linear, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y64 and 2 max|peer - y64| + ulp(y64) + 4 sqrt(K) 2^-24 (|x| |W|^T), for fp32 results.

    `model` is in fp64 and dense, adapters merged; `last` is its last layer, whose sums the third
    term is about. The first covers what the layers before it have done to x.
    """
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = model(*inputs)
    hook.remove()
    truth: torch.Tensor = getattr(y, "logits", y)
    sums = seen[0].abs() @ last.weight.abs().t()
    rounding = 4 * last.in_features**0.5 * 2.0**-24 * sums
    return truth, 2 * (peer - truth).abs().max() + ulp(truth, torch.float32) + rounding


def assert_result(
    y: Any, peer: torch.Tensor, model: Any, last: nn.Linear, *inputs: torch.Tensor
) -> None:
    """Hold a session's result against the budget, element by element."""
    truth, budget = truth_and_budget(peer, model, last, *inputs)
    worst = ((torch.as_tensor(y) - truth).abs() / budget).max()
    assert worst <= 1, f"{worst:.2f} of the budget"
