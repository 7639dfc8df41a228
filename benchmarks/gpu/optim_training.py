"""Checks of whole optimizers on a GPU, for optim_check: bits, scaling, sharding, no waiting."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from feinwerk.optim import AdamW, GradScaler, ShardedAdamW, gradient_norm
from feinwerk.testing import assert_same_bits

Checks = Iterator[tuple[str, Callable[[], None]]]
GPU = torch.device("cuda")
SEED = 11


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Any]:
    """A few trainable parameters with 8-bit and fp32 states."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = ((64, 128), (130,), (7, 700), (16, 512), (512, 16), (1,))
    drawn = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [torch.nn.Parameter(p.to(device)) for p in drawn]


def give_gradients(params: list[Any], step: int, scale: float = 1.0) -> None:
    """The same gradients on every device."""
    generator = torch.Generator().manual_seed(SEED + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p)


def train(optimizer: Any, params: list[Any], steps: int = 3) -> list[torch.Tensor]:
    """A few steps; what the parameters are then."""
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu() for p in params]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Every bit."""
    for i, (one, other) in enumerate(zip(left, right, strict=True)):
        assert_same_bits(one, other, f"parameter {i}")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIONS: dict[str, dict[str, Any]] = {
    "8-bit": {},
    "32-bit": {"state_bits": 32},
    "16-bit": {"state_bits": 16},
    "clipped": {"max_grad_norm": 0.5},
}


def optimizers() -> Checks:
    """AdamW on the GPU against AdamW on the CPU, GradScaler, and no waiting."""
    for name, options in OPTIONS.items():

        def check(options: dict[str, Any] = options) -> None:
            for dtype in (torch.float32, torch.bfloat16):
                theirs, mine = parameters(GPU, dtype), parameters(torch.device("cpu"), dtype)
                there, here = AdamW(theirs, lr=0.01, **options), AdamW(mine, lr=0.01, **options)
                same(train(there, theirs), train(here, mine))
                assert there.last_grad_norm == here.last_grad_norm

        yield f"AdamW {name} as on the CPU", check

    def norm() -> None:
        theirs, mine = parameters(GPU), parameters(torch.device("cpu"))
        for params in (theirs, mine):
            give_gradients(params, 0)
        assert gradient_norm(theirs) == gradient_norm(mine)

    def scaler() -> None:
        for kind in (torch.amp.GradScaler, GradScaler):
            scaled, unscaled = parameters(GPU), parameters(GPU)
            one, other = AdamW(scaled, lr=0.01), AdamW(unscaled, lr=0.01)
            scaling = kind("cuda", init_scale=1024.0)
            scaling.scale(torch.zeros((), device=GPU))
            for step in range(3):
                give_gradients(scaled, step, 1024.0)
                give_gradients(unscaled, step)
                scaling.step(one)
                scaling.update()
                other.step()
            same([p.detach() for p in scaled], [p.detach() for p in unscaled])
            before = [p.detach().clone() for p in scaled]
            give_gradients(scaled, 4, 1024.0)
            scaled[2].grad.view(-1)[7] = torch.inf
            scaling.step(one)
            scaling.update()
            same([p.detach() for p in scaled], before)
            assert scaling.get_scale() == 512.0, scaling.get_scale()

    def never_waits() -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for options in (*OPTIONS.values(), {"bf16_params": "stochastic"}):
                params = parameters(GPU, dtype)
                optimizer = AdamW(params, lr=0.01, **options)
                train(optimizer, params, 1)
                give_gradients(params, 1)
                with no_waiting():
                    optimizer.step()
                    optimizer.step()

    yield "gradient_norm as on the CPU", norm
    yield "GradScaler: scaled steps, then an infinity", scaler
    yield "a step never waits for the GPU", never_waits


def sharded() -> Checks:
    """ShardedAdamW over an NCCL group of one rank, and without one."""
    import torch.distributed as dist

    def check(group: bool, options: dict[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            if group:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                store = f"file://{folder}/store"
                dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
                stack.callback(dist.destroy_process_group)
            for dtype in (torch.float32, torch.bfloat16):
                mine, plain = parameters(GPU, dtype), parameters(GPU, dtype)
                optimizer = ShardedAdamW(mine, lr=0.01, **options)
                stack.callback(optimizer.close)
                norm = options.get("max_grad_norm")
                same(train(optimizer, mine), train(AdamW(plain, 0.01, max_grad_norm=norm), plain))
                if options.get("offload") == "cpu":
                    for state in optimizer.state.values():
                        for name, tensor in state.items():
                            local = getattr(tensor, "_local_tensor", tensor)
                            assert local.is_pinned(), f"{name} is not pinned"

    cases: dict[str, dict[str, Any]] = {
        "stage 1": {"stage": 1},
        "stage 2": {"stage": 2},
        "small buckets, clipped": {"bucket_mb": 0.01, "max_grad_norm": 0.5},
        'offload="cpu"': {"offload": "cpu"},
        'offload="cpu", small buckets': {"offload": "cpu", "bucket_mb": 0.01},
    }
    for group in (False, True):
        for name, options in cases.items():
            where = "NCCL, one rank" if group else "no group"
            yield f"ShardedAdamW, {where}, {name}", lambda g=group, o=options: check(g, o)
