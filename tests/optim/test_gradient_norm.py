"""The gradient norm of parameters, and what clipping takes from it."""

from __future__ import annotations

import math

import pytest
import torch

from feinwerk import optim
from feinwerk.optim.gradient_norm import clip_coefficient, first_nonfinite


def exact_norm(grads: list[torch.Tensor]) -> float:
    """To fp64's precision: a sum of exact squares that is rounded once, and a root."""
    return math.sqrt(math.fsum(x * x for g in grads for x in g.flatten().tolist()))


def test_the_norm_of_parameters() -> None:
    params = [torch.zeros(4, 3, requires_grad=True), torch.zeros(7, requires_grad=True)]
    params.append(torch.zeros(2, requires_grad=True))  # has no gradient
    assert optim.gradient_norm(params) == 0.0
    for seed, param in enumerate(params[:2]):
        generator = torch.Generator().manual_seed(seed)
        param.grad = torch.randn(param.shape, generator=generator) * 10.0**seed
    truth = exact_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(iter(params)) == pytest.approx(truth, rel=2.0**-51)
    assert params[0].grad is not None
    assert optim.gradient_norm(params[0]) == pytest.approx(exact_norm([params[0].grad]), rel=1e-15)
    reference = torch.nn.utils.get_total_norm([p.grad for p in params[:2] if p.grad is not None])
    assert optim.gradient_norm(params) == pytest.approx(float(reference), rel=1e-6)
    assert first_nonfinite(params) is None
    params[1].grad = torch.full((7,), math.nan)
    assert first_nonfinite(params) == 1


def test_the_clip_coefficient_is_torch_s() -> None:
    for norm in (0.0, 0.5, 1.0, 1.5, 1e10, math.inf):
        param = torch.zeros(1, requires_grad=True)
        param.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        expected = torch.tensor([norm]) * clip_coefficient(norm, 1.0)
        assert torch.allclose(param.grad, expected, rtol=1e-6, equal_nan=True)
    assert math.isnan(clip_coefficient(math.nan, 1.0))
