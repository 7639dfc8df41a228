"""NF4 modules whose tensors are seen by rows, in one process: values, moves, ties, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from feinwerk import explain, quantize_model
from feinwerk.distributed import local_nf4_weight, shard_nf4, sharded_row_norms, unshard_nf4
from feinwerk.distributed.shard_nf4 import check_torch
from feinwerk.nn import DoRALinear, LoRALinear, NF4Embedding, NF4Linear, dequantize_model
from feinwerk.nn.nf4_rows import own_rows
from feinwerk.weight import NF4Weight
from tests.distributed.sharded_models import adapted_model, base_model, differing, loss_of, shard


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def linear(N: int = 6, K: int = 128, *, double_quant: bool = True, blocksize: int = 64) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(K, N)
    return NF4Linear.from_linear(layer, double_quant=double_quant, blocksize=blocksize)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_same_bytes_as_matrices(mesh: DeviceMesh, double_quant: bool) -> None:
    layer = linear(double_quant=double_quant)
    codes, absmax = layer.weight.detach().clone(), layer.absmax.clone()
    x = torch.randn(3, 128, requires_grad=True)
    y, dense = layer(x), layer.dequantize()
    report = shard_nf4(nn.Sequential(layer), mesh)
    assert layer.by_rows
    assert layer.weight.shape == (6, 64)
    rows = layer.get_parameter("absmax_rows")
    assert rows.shape == ((6, 2) if double_quant else (6, 8))
    assert layer.weight.dtype == rows.dtype == torch.uint8
    assert not any(p.requires_grad for p in (layer.weight, rows))
    assert torch.equal(layer.weight.reshape(-1, 1), codes)
    assert torch.equal(layer.absmax, absmax)
    assert "absmax" not in dict(layer.named_buffers())
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.dequantize(), dense)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    (found,) = report.layers
    assert (found.name, found.shape, found.first_row, found.rows) == ("0", (6, 128), 0, 6)
    assert found.bytes == found.local_bytes == layer.weight.nbytes + rows.nbytes
    assert str(report) == "1 NF4 weights by rows over 1 ranks, 0.0 MiB -> 0.0 MiB a rank"


def test_an_embedding_and_a_copy(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    table = NF4Embedding.from_embedding(nn.Embedding(5, 64))
    ids = torch.tensor([[4, 0, 2]])
    expected = table(ids)
    shard_nf4(nn.Sequential(table), mesh)
    assert torch.equal(table(ids), expected)
    assert torch.equal(copy.deepcopy(table)(ids), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_casts_and_moves_leave_the_bytes_alone(mesh: DeviceMesh, double_quant: bool) -> None:
    layer = linear(double_quant=double_quant)
    dense = layer.dequantize()
    shard_nf4(nn.Sequential(layer), mesh)
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), dense.to(torch.bfloat16))
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.float32)
    assert layer.dtype == torch.bfloat16  # nothing was asked of it yet
    assert torch.equal(layer.dequantize(torch.float32), dense)
    assert layer.dtype == torch.float32
    assert all(p.dtype == torch.uint8 for n, p in layer.named_parameters() if n != "bias")


def test_loading_keeps_the_view_by_rows(mesh: DeviceMesh) -> None:
    torch.manual_seed(3)
    source = NF4Linear.from_linear(nn.Linear(128, 6))
    for assign in (False, True):
        layer = linear()
        shard_nf4(nn.Sequential(layer), mesh)
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert layer.by_rows
        assert torch.equal(layer.dequantize(), source.dequantize())
        assert not differing(layer.state_dict(), source.state_dict())
        assert layer.state_dict().keys() == source.state_dict().keys()
    other = linear(double_quant=False)
    with pytest.raises(RuntimeError, match="must have blocksize=64, double_quant=True"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.dequantize(), source.dequantize())


def test_tied_weights_stay_tied(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(33, 64), nn.Linear(64, 64), nn.Linear(64, 33))
    model[2].weight = model[0].weight
    quantize_model(model, skip=(), embeddings=True)
    ids = torch.tensor([1, 32])
    expected = model(ids)
    report = shard_nf4(model, mesh)
    assert model[0].weight is model[2].weight
    assert model[0]._parameters["absmax_rows"] is model[2]._parameters["absmax_rows"]
    assert [layer.name for layer in report.layers] == ["0", "1"]
    fully_shard(model, mesh=mesh)
    assert torch.equal(model(ids), expected)
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "why"),
    [
        (4, 96, 64, "K = 96 is not a multiple of blocksize 64, so blocks cross rows"),
        (4, 63, 64, "K = 63 is not a multiple of blocksize 64, so blocks cross rows"),
        (4, 128, 256, "K = 128 is not a multiple of blocksize 256, so blocks cross rows"),
        (4, 96, 32, ""),
        (1, 64, 64, ""),
    ],
)
def test_blocks_that_cross_rows_stay_whole(
    mesh: DeviceMesh, N: int, K: int, blocksize: int, why: str
) -> None:
    model = nn.Sequential(linear(N, K, blocksize=blocksize))
    weight, x = model[0].weight, torch.randn(2, K)
    expected = model(x)
    report = shard_nf4(model, mesh)
    again = shard_nf4(model, mesh)
    for one in (report, again):
        assert one.replicated == ({"0": why} if why else {})
        assert len(one.layers) == (0 if why else 1)
        assert one.ignored_params == ({weight} if why else set())
    if why:
        assert f"on every rank: 0 ({why})" in str(report)
        with pytest.raises(ValueError, match="must have its rows viewed by shard_nf4, got K = "):
            local_nf4_weight(model[0])
    fully_shard(model, mesh=mesh, ignored_params=report.ignored_params)
    assert torch.equal(model(x), expected)
    row = explain(model).rows[0]
    stands = f"on every rank: {why}" if why else "rows sharded over 1 ranks"
    assert row.why == f"the weight is in NF4; {stands}"
    assert hasattr(model[0].weight, "device_mesh") is False  # gathered, or never cut


def test_a_weight_that_is_not_ignored_is_cut_by_bytes_and_works(mesh: DeviceMesh) -> None:
    model = nn.Sequential(linear(4, 96))
    x = torch.randn(2, 96)
    expected = model(x)
    shard_nf4(model, mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    assert "codes sharded by bytes: K = 96" in explain(model).rows[0].why
    assert torch.equal(model(x), expected)
    assert [name for name, _ in unshard_nf4(model)] == ["0"]


def test_a_base_sharded_without_its_adapter_is_refused_by_name(mesh: DeviceMesh) -> None:
    for kind in (LoRALinear, DoRALinear):
        model: Any = nn.Sequential(kind(linear(), 2, lora_alpha=4))
        shard_nf4(model, mesh)
        fully_shard(model[0].base_layer, mesh=mesh)
        rule = (
            r"NF4Linear: weight must be gathered before it is used: call fully_shard on the block"
        )
        with pytest.raises(RuntimeError, match=rule):
            model(torch.randn(2, 128))


def test_norms_of_dora_survive_and_are_found_again(mesh: DeviceMesh) -> None:
    plain, model = adapted_model(dora=True), adapted_model(dora=True)
    base = model[1].up.base_layer
    model[1].up.invalidate()
    shard(model, mesh)
    kept = model[1].up.base_norm
    assert torch.equal(kept, plain[1].up.base_norm)
    assert torch.equal(sharded_row_norms(base), kept)
    expected = loss_of(plain).item()
    assert loss_of(model).item() == expected
    assert model[1].up.base_norm is kept
    model.to("cpu")  # forgets them, as every move does
    assert model[1].up.base_norm is None
    assert loss_of(model).item() == expected
    assert torch.equal(model[1].up.base_norm, kept)


def test_local_weights_before_fully_shard_are_whole(mesh: DeviceMesh) -> None:
    layer = linear()
    dense = layer.dequantize()
    shard_nf4(nn.Sequential(layer), mesh)
    local = local_nf4_weight(layer)
    assert isinstance(local, NF4Weight)
    assert torch.equal(local.dequantize(), dense)
    assert torch.equal(sharded_row_norms(layer), torch.linalg.norm(dense, dim=1))


def test_merging_is_refused_and_dequantizing_is_not(mesh: DeviceMesh) -> None:
    model: Any = nn.Sequential(LoRALinear(linear(), 2, lora_alpha=4))
    dense = model[0].base_layer.dequantize()
    shard_nf4(model, mesh)
    with pytest.raises(ValueError, match="weight must be merged before shard_nf4"):
        model[0].merge()
    assert not model[0].merged
    dequantize_model(model)
    assert torch.equal(model[0].base_layer.weight, dense)


def test_what_cannot_be_sharded_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(TypeError, match=r"shard_nf4: model must be a torch.nn.Module, got int"):
        shard_nf4(3, mesh)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shard_nf4: mesh must be a DeviceMesh, got str"):
        shard_nf4(base_model(), "cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_nf4: mesh must have 1 dimension, or 2 for HSDP"):
        shard_nf4(base_model(), init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=tuple("abc")))
    model: Any = base_model()
    fully_shard(model[1], mesh=mesh)
    with pytest.raises(ValueError, match="shard_nf4: 1 must not be under fully_shard yet"):
        shard_nf4(model, mesh)
    assert not model[0].by_rows
    merged: Any = nn.Sequential(LoRALinear(linear(), 2, lora_alpha=4))
    merged[0].merge()
    with pytest.raises(ValueError, match="shard_nf4: 0 must be unmerged"):
        shard_nf4(merged, mesh)
    for op in (local_nf4_weight, sharded_row_norms):
        with pytest.raises(TypeError, match="layer must be an NF4Linear or NF4Embedding, got Li"):
            op(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="by shard_nf4, got a flat weight"):
            op(linear())
    with pytest.raises(TypeError, match=r"unshard_nf4: model must be a torch.nn.Module, got int"):
        next(unshard_nf4(3))  # type: ignore[arg-type]


def test_own_rows_follow_the_placement(mesh: DeviceMesh) -> None:
    full = torch.zeros(3, 4)
    assert own_rows(full) == (0, 3)
    assert own_rows(distribute_tensor(full, mesh, [Replicate()])) == (0, 3)
    assert own_rows(distribute_tensor(full, mesh, [Shard(0)])) == (0, 3)
    with pytest.raises(NotImplementedError, match="weight must be sharded by rows over one dim"):
        own_rows(distribute_tensor(full, mesh, [Shard(1)]))


def test_an_older_torch_is_refused() -> None:
    for version in ("2.11.0", "2.11.1+cu128", "2.9.1", "1.13.0"):
        with pytest.raises(NotImplementedError, match=r"torch must be at least 2\.12: "):
            check_torch(version)
    for version in ("2.12.0", "2.13.0+cpu", "3.0.0a0+git123"):
        check_torch(version)
