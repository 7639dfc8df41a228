"""What every rank of a sharded fine-tune really holds and allocates, for test_plan_ranks.py."""

from __future__ import annotations

from typing import Any

import torch

from tests.plan import memory_meter


def measured(rank: int, world_size: int, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """For each case its bytes on this rank: model, states, and the peak of the first two steps."""
    torch.set_num_threads(1)
    return [_case(world_size, **case) for case in cases]


def _case(
    world_size: int,
    method: str,
    stage: int,
    r: int,
    batch: int,
    seq: int,
    bucket_mb: float,
    **sizes: Any,
) -> dict[str, int]:
    from feinwerk.optim import AdamW, ShardedAdamW

    model = memory_meter.causal_model("Llama", "full", "float32", "sdpa", r, **sizes)
    if method != "full":
        model = memory_meter.adapted(model, method, r, peft=False)
    tokens = memory_meter.tokens_of(model, batch, seq)
    if stage == 3:
        _fully_shard(model, world_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if stage in (1, 2):
        optimizer: Any = ShardedAdamW(trained, stage=stage, bucket_mb=bucket_mb)
    else:
        optimizer = AdamW(trained)
    if stage == 0:
        model = torch.nn.parallel.DistributedDataParallel(model)
    held = memory_meter.model_bytes(model)
    peak = memory_meter.peak_bytes(memory_meter.training_steps(model, optimizer, tokens))
    return {"model": held, "states": memory_meter.state_bytes(optimizer), "peak": held + peak}


def _fully_shard(model: Any, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from feinwerk.distributed import shard_nf4

    mesh = init_device_mesh("cpu", (world_size,))
    ignored = shard_nf4(model, mesh).ignored_params
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
