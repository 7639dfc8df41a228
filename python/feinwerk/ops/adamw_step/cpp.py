"""adamw_step through the native extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feinwerk._native.adamw import adamw_step as _adamw_step

Tensors = Sequence[torch.Tensor]


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    remainders: Tensors,
    steps: Sequence[int],
    parameter_ids: Sequence[int],
    first_elements: Sequence[int],
    seed: torch.Tensor | None = None,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int = 256,
    maximize: bool = False,
) -> None:
    """Forward to the native kernel."""
    _adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, remainders,
        steps, parameter_ids, first_elements, seed, clip_coef, grad_scale, found_inf,
        (lr, beta1, beta2, eps, weight_decay), blocksize, maximize,
    )  # fmt: skip
