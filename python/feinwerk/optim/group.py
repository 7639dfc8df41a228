"""The options of a parameter group and the parameters in it: defaults and checks, in one form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from feinwerk import _checks

# What decides the tensors of a state: it must not change between saving and loading.
LAYOUT_OPTIONS = ("state_bits", "blocksize", "layout", "min_quantized_numel", "bf16_params")

_CHOICES = {
    "state_bits": (8, 16, 32),
    "layout": ("rows", "flat"),
    "bf16_params": ("remainder", "stochastic"),
}
PARAM_DTYPES = (torch.float32, torch.bfloat16)
DTYPE_RULE = "be torch.float32 or torch.bfloat16"


def check_group(op: str, group: Mapping[str, Any]) -> None:
    """Reject options that break their rule, and trainable parameters of another dtype.

    Args:
        op: the optimizer's name, for messages.
        group: a parameter group with every option filled in.

    Raises:
        TypeError: if a parameter that requires a gradient is neither fp32 nor bf16.
        ValueError: if an option breaks its rule.
    """
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            rule = f"be one of {', '.join(map(repr, choices))}"
            _checks.reject(ValueError, op, name, rule, repr(group[name]))
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        rule = "be a number or a tensor with one element"
        _checks.reject(ValueError, op, "lr", rule, tuple(lr.shape))
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            rule = "be a finite number of at least 0"
            _checks.reject(ValueError, op, name, rule, group[name])
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        _checks.reject(ValueError, op, "betas", "be two numbers in [0, 1)", betas)
    if not 0 < group["eps"] < math.inf:
        _checks.reject(ValueError, op, "eps", "be a finite number above 0", group["eps"])
    for name in ("blocksize", "min_quantized_numel"):
        if not isinstance(group[name], int) or group[name] < 1:
            _checks.reject(ValueError, op, name, "be a whole number of at least 1", group[name])
    if not isinstance(group["seed"], int) or not -(2**63) <= group["seed"] < 2**63:
        _checks.reject(ValueError, op, "seed", "be a whole number of 64 bits", group["seed"])
    names = group.get("param_names")
    for i, param in enumerate(group["params"]):
        # Frozen integer tensors, such as NF4 codes, may be handed over: they never get a gradient.
        if param.requires_grad and param.dtype not in PARAM_DTYPES:
            where = f"params[{i}]" + (f" ({names[i]!r})" if names else "")
            _checks.reject(TypeError, op, where, DTYPE_RULE, param.dtype)


def check_max_grad_norm(op: str, max_grad_norm: float | None) -> None:
    """Reject a bound of the gradient norm that is no positive number."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        rule = "be above 0, or None for no clipping"
        _checks.reject(ValueError, op, "max_grad_norm", rule, max_grad_norm)


def parameter_name(param_groups: list[dict[str, Any]], index: int) -> str:
    """Return how messages name a parameter: its index over all groups, and its name if known.

    Args:
        param_groups: of an optimizer.
        index: over all groups, from 0.

    Example:
        >>> parameter_name([{"params": ["w", "b"], "param_names": ["0.weight", "0.bias"]}], 1)
        "parameter 1 ('0.bias')"
    """
    names = [name for group in param_groups for name in group.get("param_names", ())]
    return f"parameter {index} ({names[index]!r})" if names else f"parameter {index}"
