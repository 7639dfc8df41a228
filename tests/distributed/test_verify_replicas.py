"""verify_replicas finds one bit between replicas, under HSDP and without; HSDP trains as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from feinwerk.distributed import shard_nf4, verify_replicas
from feinwerk.optim.errors import Disagreement
from feinwerk.optim.tensor_hash import hash_bytes
from tests.distributed.sharded_models import (
    adapted_model,
    base_model,
    differing,
    gradients,
    loss_of,
    shard,
    train,
)
from tests.optim.processes import run_ranks


def told(call: Any) -> Disagreement | int:
    try:
        result: int = call()
    except Disagreement as error:
        return error
    return result


def hybrid(rank: int, world_size: int) -> dict[str, Any]:
    """Two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, model = adapted_model(dora=True), adapted_model(dora=True)
    report = shard(model, mesh)
    loss, sharded_loss = loss_of(plain), loss_of(model)
    loss.backward()
    sharded_loss.backward()
    found: dict[str, Any] = {
        "ranks": report.world_size,
        "loss": loss.item() == sharded_loss.item(),
        # The same batch everywhere: a sum of four equal numbers, and a quarter of it.
        "gradients": differing(gradients(plain), gradients(model)),
    }
    model.zero_grad()
    train(model, 2)
    with torch.no_grad():
        loss_of(model)  # leaves the root gathered
    found["tensors"] = len(list(model.parameters())) + len(list(model.buffers()))
    found["same"] = told(lambda: verify_replicas(model))

    weight: Any = model.get_parameter("1.up.base_layer.weight")
    if rank == 3:
        weight.to_local()[0, 0] ^= 1
    found["one code"] = told(lambda: verify_replicas(model))
    found["in a mapping"] = told(lambda: verify_replicas({"w": weight}))
    if rank == 3:
        weight.to_local()[0, 0] ^= 1
        model.get_buffer("4.base_norm")[2] += 1
    found["a buffer"] = told(lambda: verify_replicas(model, mesh))
    return found


def test_hybrid_sharding_trains_as_one_and_a_flipped_bit_is_found() -> None:
    for rank, found in enumerate(run_ranks(hybrid, 4)):
        assert found["ranks"] == 2
        assert found["loss"]
        assert not found["gradients"]
        assert found["same"] == found["tensors"], rank
        # Ranks 0 and 2 hold other rows, which agree; they are told all the same.
        error = found["one code"]
        assert isinstance(error, Disagreement)
        assert error.name == "1.up.base_layer.weight"
        assert sorted(error.held.values()) == [(1,), (3,)]
        assert "uint8 [96, 32], with hash" in str(error)
        assert found["in a mapping"].name == "w"
        assert found["a buffer"].name == "4.base_norm"


def plain_tensors(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    tensors = dict(net.named_parameters())
    found: dict[str, Any] = {
        "equal": told(lambda: verify_replicas(net)),
        "in a list": told(lambda: verify_replicas(list(tensors.values()), mesh)),
        "by a group": told(lambda: verify_replicas(tensors, dist.group.WORLD)),
    }
    if rank == 1:
        del tensors["1.bias"]
    found["one lacks"] = told(lambda: verify_replicas(tensors))
    found["dtype"] = told(
        lambda: verify_replicas(
            [torch.zeros(2, dtype=[torch.int32, torch.float32, torch.int32][rank])]
        )
    )
    if rank == 2:
        net[0].weight.data[0, 0] = -net[0].weight.data[0, 0]
    found["one sign"] = told(lambda: verify_replicas(net))
    # Rows that a shard alone holds have no replica.
    fully_shard(net, mesh=mesh)
    found["sharded"] = told(lambda: verify_replicas(net))

    # Other NF4 weights on one rank are noticed before anything is cut.
    other = base_model(seed=int(rank == 1))
    found["base"] = told(lambda: len(shard_nf4(other, mesh).layers))
    found["changed"] = any(getattr(module, "by_rows", False) for module in other.modules())
    found["not compared"] = len(shard_nf4(other, mesh, compare=False).layers)
    return found


def test_plain_tensors_are_compared_over_the_group() -> None:
    for found in run_ranks(plain_tensors, 3):
        assert found["equal"] == found["in a list"] == found["by a group"] == 4
        assert found["one lacks"].name == "1.bias"
        assert found["one lacks"].held["no tensor"] == (1,)
        assert found["dtype"].name == "0"
        assert found["one sign"].name == "0.weight"
        assert sorted(found["one sign"].held.values()) == [(0, 1), (2,)]
        assert found["sharded"] == 0
        assert found["base"].name == "0.weight"
        assert not found["changed"]
        assert found["not compared"] == 8


def test_the_hash_shows_any_one_word() -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 256, (4099,), dtype=torch.uint8)
    seen = {hash_bytes(data)}
    for position in (0, 1, 4095, 4096, 4098):
        changed = data.clone()
        changed[position] ^= 128
        seen.add(hash_bytes(changed))
    swapped = data.clone()
    swapped[:4], swapped[4:8] = data[4:8], data[:4]
    seen |= {
        hash_bytes(swapped),
        hash_bytes(data[:-1]),
        hash_bytes(torch.cat([data, data[:1] * 0])),
    }
    assert len(seen) == 9
    assert hash_bytes(data) in seen
    assert all(0 <= value < 2**64 for value in seen)


def test_the_hash_is_of_bytes_in_slabs_of_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = torch.randn(37, 11)
    expected = hash_bytes(values)
    assert hash_bytes(values.reshape(-1)) == expected
    assert hash_bytes(values.t().contiguous().t()) == expected
    assert hash_bytes(torch.cat([torch.zeros(1), values.reshape(-1)])[1:]) == expected
    assert hash_bytes(values.view(torch.uint8)) == expected
    offset = torch.cat([torch.zeros(3, dtype=torch.uint8), values.view(torch.uint8).reshape(-1)])
    assert hash_bytes(offset[3:]) == expected
    monkeypatch.setattr("feinwerk.optim.tensor_hash._SLAB", 64)
    assert hash_bytes(values) == expected
    assert hash_bytes(torch.zeros(0)) == 0
    assert hash_bytes(torch.tensor(True)) != hash_bytes(torch.tensor(False))
    assert hash_bytes(-torch.zeros(1)) != hash_bytes(torch.zeros(1))


def test_what_is_no_tensor_is_refused() -> None:
    rule = "verify_replicas: model_or_tensors must be a torch.nn.Module, a dict or a list"
    for wrong in (torch.zeros(2), 3):
        with pytest.raises(TypeError, match=rule):
            verify_replicas(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"verify_replicas: 0 must be a torch.Tensor, got int"):
        verify_replicas([1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="verify_replicas: group must be a process group"):
        verify_replicas([torch.zeros(1)], 3)  # type: ignore[arg-type]
    assert verify_replicas([torch.zeros(1)]) == 0  # no ranks
