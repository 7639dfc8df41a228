"""What ranks do in the tests of how ShardedAdamW behaves: each function runs on every rank."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from feinwerk.optim import AdamW, Disagreement, GradScaler, ShardedAdamW, ShardingError
from feinwerk.optim.collectives import Collectives
from tests.optim.sharded_cases import (
    average,
    backward,
    compare_with_plain,
    differences,
    gradient,
    parameters,
)


def bits(params: list[Any]) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train(params: list[Any], optimizer: ShardedAdamW, rank: int, step: int) -> None:
    backward(params, rank, step)
    optimizer.step()
    optimizer.zero_grad()


def disagreements(rank: int, world_size: int) -> dict[str, str]:
    """Rank 1 differs in one thing."""
    odd = rank == 1

    def start(params: Any, **options: Any) -> str:
        flat = [param[1] if isinstance(param, tuple) else param for param in params]
        optimizer = ShardedAdamW(params, **{"lr": 0.1, **options})

        def one_step() -> None:
            sum((param.float() ** 2).sum() for param in flat if param.requires_grad).backward()
            optimizer.step()

        message = raised(one_step)
        assert isinstance(optimizer.state_dict(), dict)
        return message

    def two(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]

    w, b = two((4, 3), (4,))
    found = {
        "shape": start(two((4, 3), (5,) if odd else (4,))),
        "order": start([("b", b), ("w", w)] if odd else [("w", w), ("b", b)]),
        "number": start(two((4, 3)) if odd else two((4, 3), (4,))),
        "dtype": start(two((2, 2), dtype=torch.bfloat16 if odd else torch.float32)),
        "lr": start(two((2, 2)), lr=0.2 if odd else 0.1),
        "betas": start(two((2, 2)), betas=(0.9, 0.99 if odd else 0.999)),
        "stage": start(two((2, 2)), stage=1 if odd else 2),
        "clipping": start(two((2, 2)), max_grad_norm=1.0 if odd else None),
    }
    params = two((2, 2), (3,))
    params[1].requires_grad_(not odd)
    found["ready set"] = start(params)

    params = parameters()
    optimizer = ShardedAdamW(params, lr=0.1)
    train(params, optimizer, rank, 0)
    optimizer.param_groups[0]["lr"] = 0.3 if odd else 0.1
    found["lr later"] = raised(lambda: train(params, optimizer, rank, 1))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    if odd:
        optimizer.state[params[0]]["step"].fill_(7)
    found["step"] = raised(lambda: train(params, optimizer, rank, 1))
    if odd:
        optimizer.state[params[0]]["step"].fill_(1)
    optimizer.zero_grad()
    found["then"] = raised(lambda: train(params, optimizer, rank, 1))
    return found


def nonfinite(rank: int, world_size: int) -> None:
    """A NaN or an infinity on one rank: nobody steps, everybody counts it and goes on."""
    for stage in (1, 2):
        for bad, clip in ((torch.nan, None), (torch.inf, None), (-torch.inf, 1.0), (torch.nan, 1)):
            params, plain = parameters(), parameters()
            named = [(f"layer.{i}", param) for i, param in enumerate(params)]
            optimizer = ShardedAdamW(
                named, lr=0.1, stage=stage, bucket_mb=0.002, max_grad_norm=clip
            )
            reference = AdamW(plain, lr=0.1, max_grad_norm=clip)
            for step in range(3):
                before = bits(params)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    loss: Any = sum(
                        (param * gradient(param, rank, step, i)).sum()
                        for i, param in enumerate(params)
                    )
                    if step == 1 and rank == world_size - 1:
                        # The last row: some other rank's, or nobody's but its own.
                        loss = loss + params[5][4, 2, 1] * bad + params[6][0, 0] * bad
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                ours = [str(w.message) for w in caught if "ShardedAdamW" in str(w.message)]
                if step == 1:
                    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
                    assert len(ours) == 1, ours
                    assert "first in parameter 5 ('layer.5'); all ranks skip the step (1" in ours[0]
                    continue
                assert not ours
                for i, param in enumerate(plain):
                    param.grad = average(param, i, range(world_size), step)
                reference.step()
            assert optimizer.skipped_steps == 1
            assert optimizer.nonfinite_parameter == "parameter 5 ('layer.5')"
            assert not differences(params, optimizer, plain, reference)
            optimizer.close()
    params = parameters()
    optimizer = ShardedAdamW(params, skip_nonfinite=False)
    (params[0][0, 0] * (torch.nan if rank == 0 else 1.0)).backward()
    optimizer.step()
    assert params[0].isnan().sum() == 1
    optimizer.close()


def scaler(rank: int, world_size: int) -> None:
    """The same scale on all ranks, whoever had the infinity; steps as without a scaler."""
    for stage in (1, 2):
        params, plain = parameters(), parameters()
        optimizer = ShardedAdamW(params, lr=0.1, stage=stage, max_grad_norm=1.0)
        reference = AdamW(plain, lr=0.1, max_grad_norm=1.0)
        grad_scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(4):
                loss: Any = sum(
                    (param * gradient(param, rank, step, i)).sum() for i, param in enumerate(params)
                )
                if step == 1 and rank == 1:
                    loss = loss + params[6][0, 0] * torch.inf
                grad_scaler.scale(loss).backward()
                grad_scaler.step(optimizer)
                grad_scaler.update()
                scales.append(grad_scaler.get_scale())
                optimizer.zero_grad()
                if step != 1:
                    for i, param in enumerate(plain):
                        param.grad = average(param, i, range(world_size), step)
                    reference.step()
        assert scales == [1024.0, 512.0, 512.0, 1024.0]
        assert optimizer.skipped_steps == 0
        # A scale that is a power of two changes no bit, of the norm neither.
        assert optimizer.last_grad_norm == reference.last_grad_norm
        assert not differences(params, optimizer, plain, reference)
        message = raised(lambda: grad_scaler.unscale_(optimizer))  # noqa: B023
        assert "optimizer must not be unscaled (it clips by max_grad_norm)" in message
        torch_scaler = torch.amp.GradScaler("cpu")
        torch_scaler.scale(params[0].sum()).backward()
        message = raised(lambda: torch_scaler.step(optimizer))  # noqa: B023
        assert "scaler must be feinwerk.optim.GradScaler" in message
        optimizer.close()


class Shared(nn.Module):
    """Tied weights, a layer that is used twice, and one that is recomputed in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.twice, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in (self.twice, self.other, self.twice):
            if self.reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = torch.tanh(checkpoint(layer, x, use_reentrant=self.reentrant))
        return self.head(x)


def shared_layers(rank: int, world_size: int) -> None:
    """Whatever autograd does, the same as averaging the finished gradients."""
    for reentrant in (None, False, True):
        for stage in (1, 2):
            model, plain = Shared(reentrant), Shared(None)
            assert len(list(model.parameters())) == 5
            optimizer = ShardedAdamW(model.parameters(), lr=0.1, stage=stage, bucket_mb=0.0002)
            reference = AdamW(plain.parameters(), lr=0.1)
            for step in range(2):
                tokens = torch.arange(4) + rank + step
                F.cross_entropy(model(tokens), tokens).backward()
                F.cross_entropy(plain(tokens), tokens).backward()
                for param in plain.parameters():
                    everyone = [torch.empty_like(param) for _ in range(world_size)]
                    dist.all_gather(everyone, param.grad)
                    param.grad = (everyone[0] + everyone[1]) / world_size
                optimizer.step()
                optimizer.zero_grad()
                reference.step()
                reference.zero_grad()
            assert optimizer.verify_replicas() == 5
            for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
                if reentrant:
                    # Its parts are reduced one by one: sums in another order.
                    torch.testing.assert_close(a, b, msg=f"{name}, stage {stage}")
                else:
                    assert torch.equal(a, b), (name, stage, reentrant)
            optimizer.close()


def changing_parameters(rank: int, world_size: int) -> None:
    """Swapped before the first step, thawed, added: as Accelerate and gradual training do it."""
    first, params, plain = parameters(), parameters(), parameters()
    optimizer = ShardedAdamW(first[:4], lr=0.1, bucket_mb=0.002)
    reference = AdamW(plain[:4], lr=0.1)
    optimizer.param_groups[0]["params"] = params[:4]
    params[0].requires_grad_(False)
    for step in range(6):
        if step == 2:
            params[0].requires_grad_(True)
        if step == 3:
            optimizer.add_param_group({"params": params[4:], "lr": 0.3})
            reference.add_param_group({"params": plain[4:], "lr": 0.3})
        if step == 4:
            params[1].requires_grad_(False)
        for i, param in enumerate(plain):
            frozen = (i == 0 and step < 2) or (i == 1 and step >= 4) or (i >= 4 and step < 3)
            param.grad = None if frozen else average(param, i, range(world_size), step)
        backward(params if step >= 3 else params[:4], rank, step)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    assert not differences(params, optimizer, plain, reference)
    assert raised(lambda: train(parameters(), optimizer, rank, 0)) == "nothing"  # not its own
    backward(params[1:], rank, 0)
    params[1].requires_grad_(True)
    params[1].grad = torch.ones_like(params[1])
    message = raised(optimizer.step)
    assert message.startswith("ShardingError: ShardedAdamW: parameters must stay the same between")
    optimizer.close()


def loading(rank: int, world_size: int) -> None:
    """States go from one optimizer to another, sharded or whole, and training goes on."""
    params, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, reference = ShardedAdamW(params, lr=0.1), AdamW(plain, lr=0.1)
    for step in range(2):
        backward(params, 0, step)
        optimizer.step()
        backward(plain, 0, step)
        reference.step()
        reference.zero_grad()
    for given in (optimizer.state_dict(), reference.state_dict()):
        others = parameters(torch.bfloat16)
        with torch.no_grad():
            for other, param in zip(others, plain, strict=True):
                other.copy_(param)
        other_optimizer = ShardedAdamW(others, lr=0.5, stage=1)
        other_optimizer.load_state_dict(given)
        assert not differences(others, other_optimizer, plain, reference)
        assert other_optimizer.param_groups[0]["lr"] == 0.1
        twin_params = parameters(torch.bfloat16)
        with torch.no_grad():
            for other, param in zip(twin_params, plain, strict=True):
                other.copy_(param)
        twin = AdamW(twin_params, lr=0.1)
        twin.load_state_dict(reference.state_dict())
        backward(others, 0, 2)
        other_optimizer.step()
        backward(twin_params, 0, 2)
        twin.step()
        assert not differences(others, other_optimizer, twin_params, twin)
        other_optimizer.close()
    wrong = reference.state_dict()
    wrong["state"][0] = {**wrong["state"][0], "exp_avg_codes": torch.zeros(7, 700)}
    message = raised(lambda: optimizer.load_state_dict(wrong))
    assert "exp_avg_codes of parameter 0 must be torch.uint8" in message, message
    assert not differences(params, optimizer, plain, reference)
    optimizer.close()


def closure_and_schedule(params: list[Any], optimizer: ShardedAdamW, rank: int) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        backward(params, rank, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def protocol(rank: int, world_size: int) -> None:
    """Closures, schedulers, two optimizers in turn, and an end without traces."""
    params, others = parameters(), parameters()
    one, two = ShardedAdamW(params, lr=0.1), ShardedAdamW(others, lr=0.1, stage=1)
    closure_and_schedule(params, one, rank)
    backward(others, rank, 0)
    backward(params, rank, 1)
    two.step()
    one.step()
    assert one.verify_replicas() == two.verify_replicas() == len(params)
    # Stage 1 leaves gradients alone, stage 2 takes them.
    assert all(param.grad is not None for param in others)
    assert all(param.grad is None for param in params)
    # Dropped gradients are not stepped.
    before = bits(params)
    backward(params, rank, 2)
    one.zero_grad()
    one.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    # A replica that has gone astray is named.
    with torch.no_grad():
        if rank == 1:
            params[6][3, 3] += 1
    message = raised(one.verify_replicas)
    assert message.startswith(
        "Disagreement: ShardedAdamW.verify_replicas: bytes of parameter 6 "
    ), message
    assert message.count("rank") >= 2
    assert isinstance(_error(one.verify_replicas), Disagreement)
    assert issubclass(Disagreement, ShardingError)

    def beats() -> int:
        return sum(thread.name == "feinwerk-heartbeat" for thread in threading.enumerate())

    assert beats() == 2
    two.close()
    assert beats() == 1
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert beats() == 0
    backward(params, rank, 2)  # no hook is left that would wait for the other rank
    dist.barrier()


def _error(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def other_backends(rank: int, world_size: int) -> None:
    """Reduce-scatter and all-gather of the backend, as for NCCL, tried on gloo's."""
    original = Collectives.exchanges
    Collectives.exchanges = lambda self, device_type: False  # type: ignore[method-assign]
    try:
        for stage in (1, 2):
            for bucket_mb in (0.001, 25):
                # A sum of two has one order.
                options = {"stage": stage, "bucket_mb": bucket_mb}
                assert not compare_with_plain(rank, world_size, options)
                bf16: Any = {"dtype": torch.bfloat16, "same_gradients": True}
                assert not compare_with_plain(rank, world_size, options, **bf16)
    finally:
        Collectives.exchanges = original  # type: ignore[method-assign]


def behaviour(rank: int, world_size: int) -> dict[str, str]:
    """All of the above on two ranks."""
    nonfinite(rank, world_size)
    scaler(rank, world_size)
    shared_layers(rank, world_size)
    changing_parameters(rank, world_size)
    loading(rank, world_size)
    other_backends(rank, world_size)
    gc.collect()
    protocol(rank, world_size)
    return disagreements(rank, world_size)
