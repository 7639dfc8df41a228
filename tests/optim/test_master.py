"""The fp32 master of a bf16 parameter: two halves that are exact together, as the step has them."""

from __future__ import annotations

import pytest
import torch

from feinwerk.optim import AdamW
from feinwerk.optim.master import join_master, split_master
from feinwerk.testing import assert_same_bits


def test_every_kind_of_number_comes_back() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([bits, torch.tensor([0, -(2**31), 1, 0x7F800000, 0x7F7FFFFF, 0x3F808000])])
    master = bits.to(torch.int32).view(torch.float32)
    param, remainder = split_master(master)
    finite = ~master.isnan()
    assert_same_bits(join_master(param, remainder)[finite], master[finite])
    assert param[~finite].isnan().all()
    normal = finite & (master.abs() < 3e38)
    nearest = master[normal].to(torch.bfloat16).float()
    error = (param[normal].float() - master[normal]).abs()
    assert (error <= (nearest - master[normal]).abs()).all(), "the half is the nearest bf16"


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)], ids=str)
def test_it_is_the_master_that_the_step_keeps(backend: str, shape: tuple[int, ...]) -> None:
    start = torch.randn(shape).bfloat16()
    fp32 = torch.nn.Parameter(start.float())
    param = torch.nn.Parameter(start.clone())
    optimizers = [AdamW([fp32], state_bits=32), AdamW([param], state_bits=32)]
    for step in range(3):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        fp32.grad, param.grad = grad, grad.bfloat16()
        fp32.grad = param.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    remainder = optimizers[1].state[param]["param_remainder"]
    assert_same_bits(join_master(param.detach(), remainder), fp32.detach())
    halves = split_master(fp32.detach())
    assert_same_bits(halves[0], param.detach())
    assert_same_bits(halves[1], remainder)


def test_rejections() -> None:
    bf16 = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"split_master: master must be torch\.float32"):
        split_master(bf16)
    with pytest.raises(TypeError, match=r"param must be torch\.bfloat16"):
        join_master(bf16.float(), torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"remainder must be torch\.uint8"):
        join_master(bf16, torch.zeros(3, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"remainder must have shape \(3, 2\)"):
        join_master(bf16, torch.zeros(3, dtype=torch.uint8))
