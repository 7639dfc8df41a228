"""adamw_step: the list of parameters and states as addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feinwerk import _native
from feinwerk._checks import rows_of

_STATES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_FLOAT32, _REMAINDER, _STOCHASTIC = 0, 1, 2
_NONE = (0, 0, 0)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxes: Sequence[Tensor],
    exp_avg_sq_absmaxes: Sequence[Tensor],
    remainders: Sequence[Tensor],
    steps: Sequence[int],
    parameter_ids: Sequence[int],
    first_elements: Sequence[int],
    seed: Tensor | None = None,
    clip_coef: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int = 256,
    maximize: bool = False,
) -> None:
    """One step in place."""
    if not params or (found_inf is not None and found_inf.item() != 0):
        return
    factor = torch.tensor(-1.0 if maximize else 1.0, dtype=torch.float32, device="cpu")
    if clip_coef is not None:
        factor = factor * clip_coef.float()
    if grad_scale is not None:
        factor = factor / grad_scale.float()
    # Copies of gradients that are not contiguous live until the call is over.
    grads = [grad.contiguous() for grad in grads]
    tensors: list[tuple[int, ...]] = []
    for i, param in enumerate(params):
        rows, cols = rows_of(param.shape)
        absmax = (
            (
                exp_avg_absmaxes[i].data_ptr(),
                exp_avg_sq_absmaxes[i].data_ptr(),
                exp_avg_absmaxes[i].numel(),
            )
            if exp_avg_absmaxes
            else _NONE
        )
        tensors.append(
            (
                param.data_ptr(),
                remainders[i].data_ptr() if remainders else 0,
                grads[i].data_ptr(),
                exp_avgs[i].data_ptr(),
                exp_avg_sqs[i].data_ptr(),
                *absmax,
                rows,
                cols,
                steps[i],
                parameter_ids[i],
                first_elements[i],
            )
        )
    master = _FLOAT32
    if params[0].dtype is torch.bfloat16:
        master = _REMAINDER if remainders else _STOCHASTIC
    key = 0 if seed is None else int(seed) % 2**64
    _native._C.adamw_step(
        tensors,
        master,
        _native._DTYPES[grads[0].dtype],
        _STATES[exp_avgs[0].dtype],
        blocksize,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        float(factor),
        key,
        torch.get_num_threads(),
    )
