"""How ShardedAdamW behaves beside its values: skipping, refusing, changing, loading, ending."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from feinwerk.optim import ShardedAdamW
from tests.optim import sharded_ranks
from tests.optim.processes import run_ranks

# What rank 1 has otherwise, and what both ranks are told.
DISAGREEMENTS = {
    "shape": "shape of parameter 1 must be the same on all ranks, got (4,) on rank 0; (5,) on rank "
    "1",
    "order": "name of parameter 0 must be the same on all ranks, got 'w' on rank 0; 'b' on rank 1",
    "number": "number of parameters must be the same on all ranks, got 2 on rank 0; 1 on rank 1",
    "dtype": "dtype of parameter 0 must be the same on all ranks, got float32 on rank 0; bfloat16 "
    "on rank 1",
    "lr": "lr of group 0 must be the same on all ranks, got 0.1 on rank 0; 0.2 on rank 1",
    "betas": "betas of group 0 must be the same on all ranks, got [0.9, 0.999] on rank 0; [0.9, "
    "0.99] on rank 1",
    "stage": "stage must be the same on all ranks, got 2 on rank 0; 1 on rank 1",
    "clipping": "max_grad_norm must be the same on all ranks, got None on rank 0; 1.0 on rank 1",
    "ready set": "requires_grad of parameter 1 must be the same on all ranks, got True on rank 0; "
    "False on rank 1",
    "lr later": "lr of group 0 must be the same on all ranks, got 0.1 on rank 0; 0.3 on rank 1",
    "step": "step of parameter 0 must be the same on all ranks, got 1 on rank 0; 7 on rank 1",
}


def test_two_ranks() -> None:
    for messages in run_ranks(sharded_ranks.behaviour, 2, timeout=120):
        assert messages.pop("then") == "nothing"
        expected = {name: f"Disagreement: ShardedAdamW: {m}" for name, m in DISAGREEMENTS.items()}
        assert messages == expected


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "ShardedAdamW: stage must be 1 or 2, got 3"),
        ({"bucket_mb": 0}, "ShardedAdamW: bucket_mb must be a number above 0, got 0"),
        ({"timeout": -1.0}, "ShardedAdamW: timeout must be a number above 0, got -1.0"),
        ({"first_step_timeout": float("inf")}, "first_step_timeout must be a number above 0"),
        ({"offload": "gpu"}, "ShardedAdamW: offload must be"),
        ({"max_grad_norm": 0}, "ShardedAdamW: max_grad_norm must be above 0"),
        ({"lr": -1}, "ShardedAdamW: lr must be a finite number of at least 0, got -1"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ShardedAdamW([parameter(2)], **options)


def test_refused_parameters() -> None:
    with pytest.raises(ValueError, match=r"layout must be \"rows\", got 'flat'"):
        ShardedAdamW([{"params": [parameter(2)], "layout": "flat"}])
    with pytest.raises(TypeError, match=r"must be torch.float32 or torch.bfloat16"):
        ShardedAdamW([parameter(2, dtype=torch.float16)])
    twin = parameter(4)
    optimizer = ShardedAdamW([("a", twin), ("b", torch.nn.Parameter(twin.detach()))])
    with pytest.raises(ValueError, match=r"'b'\) must not share its memory with parameter 0 \('a'"):
        optimizer.step()
    with pytest.raises(TypeError, match="optimizer must be saved by its state_dict"):
        optimizer.__getstate__()


def test_sparse_gradients_and_dtensors_are_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        with pytest.raises(TypeError, match="must be a plain tensor"):
            ShardedAdamW([sharded]).step()
        # A group of one: states are DTensors as with many, gradients stay where they are.
        param = parameter(64, 64)
        optimizer = ShardedAdamW([param])
        param.sum().backward()
        optimizer.step()
        assert param.grad is not None
        codes = optimizer.state[param]["exp_avg_codes"]
        assert isinstance(codes, DTensor)
        assert codes.shape == (64, 64)
    finally:
        dist.destroy_process_group()
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = ShardedAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="gradient of parameter 0 must be dense"):
        optimizer.step()
