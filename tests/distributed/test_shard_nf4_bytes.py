"""What a rank holds and what is sent when an NF4 base is sharded, counted; norms on shards."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from feinwerk import quantize_model, row_norms
from feinwerk.distributed import local_nf4_weight, shard_nf4, sharded_row_norms
from feinwerk.nn import NF4Embedding, NF4Linear
from tests.distributed.sharded_models import (
    base_model,
    shard,
)
from tests.optim.processes import run_ranks

N, K = 511, 256
PARTS = ("weight", "absmax_rows")


class CountingAllGather(AllGather):
    """torch's own all-gather, and the bytes that it has brought from all ranks together."""

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.bytes += output_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


def one_layer(kind: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(torch.bfloat16).requires_grad_(False)
    if kind != "bf16":
        quantize_model(model, skip=(), double_quant=kind == "double_quant")
    return model


def count_bytes(mesh: DeviceMesh) -> dict[str, dict[str, int]]:
    """Bytes that a forward gathers, and of the local shards, with and without padding."""
    found = {}
    for kind in ("double_quant", "fp32", "bf16"):
        model = one_layer(kind)
        counts = {}
        if kind != "bf16":
            report = shard_nf4(model, mesh)
            counts |= {"reported": report.local_bytes, "whole": report.bytes}
            counts["rows"] = report.layers[0].rows
        fully_shard(model, mesh=mesh)
        gather = CountingAllGather()
        model.set_custom_all_gather(gather)
        shards = [parameter.to_local() for parameter in model.parameters()]
        counts["held"] = sum(local.nbytes for local in shards)
        counts["padded"] = sum(local.untyped_storage().nbytes() for local in shards)
        model(torch.randn(3, K, dtype=torch.bfloat16))
        counts["gathered"] = gather.bytes
        found[kind] = counts
    return found


def everything(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {"bytes": count_bytes(mesh), "norms": norms_on_shards(mesh)}


@pytest.fixture(scope="module")
def three_ranks() -> list[Any]:
    return run_ranks(everything, 3)


def test_a_rank_holds_its_rows_and_a_quarter_of_bf16_is_sent(three_ranks: list[Any]) -> None:
    world_size = 3
    per_row = {"double_quant": K // 2 + K // 64, "fp32": K // 2 + 4 * K // 64, "bf16": 2 * K}
    size = -(-N // world_size)
    for rank, result in enumerate(three_ranks):
        found = result["bytes"]
        rows = min(size, N - rank * size)
        for kind, counts in found.items():
            assert counts["held"] == rows * per_row[kind], (kind, rank)
            assert counts["padded"] == size * per_row[kind], (kind, rank)
            assert counts["gathered"] == world_size * size * per_row[kind], (kind, rank)
            if kind != "bf16":
                assert counts["reported"] == counts["padded"]
                assert counts["whole"] == N * per_row[kind]
                assert counts["rows"] == rows
        gathered = {kind: counts["gathered"] for kind, counts in found.items()}
        assert gathered["bf16"] / gathered["double_quant"] == pytest.approx(3.879, abs=1e-3)
        assert gathered["bf16"] / gathered["fp32"] == pytest.approx(3.556, abs=1e-3)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, NF4Linear | NF4Embedding)
    }


def norms_on_shards(mesh: DeviceMesh) -> list[Any]:
    found = []
    # The last one's absmax has 8 nested blocks, and its shards begin inside of them.
    for make in (
        base_model,
        functools.partial(base_model, double_quant=False),
        functools.partial(one_layer, "double_quant"),
    ):
        plain, sharded = make(), make()
        shard(sharded, mesh)
        for name, layer in layers_of(sharded).items():
            if name.endswith("odd"):
                continue
            one: Any = plain.get_submodule(name)
            whole = one.nf4_weight
            expected = row_norms(
                whole.packed, whole.absmax, whole.nested_absmax, whole.nested_codebook,
                whole.nested_offset, shape=whole.shape, blocksize=whole.blocksize,
            )  # fmt: skip
            local, rows = local_nf4_weight(layer), plain_rows(whole.dequantize(), mesh)
            exact = not rows.numel() if local is None else torch.equal(local.dequantize(), rows)
            found.append(
                {
                    "name": name,
                    "norms": torch.equal(sharded_row_norms(layer), expected),
                    "rows": exact,
                    "empty": local is None,
                    "refused": refusal_of(layer),
                }
            )
    return found


def plain_rows(dense: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    chunks, rank = dense.chunk(mesh.size()), mesh.get_rank()
    return chunks[rank] if rank < len(chunks) else dense[:0]


def refusal_of(layer: Any) -> str:
    try:
        layer.dequantize()
    except RuntimeError as error:
        return str(error)
    return ""


def test_row_norms_on_shards_are_the_whole_weights(three_ranks: list[Any]) -> None:
    results = [result["norms"] for result in three_ranks]
    for found in results:
        assert len(found) == 2 * 8 + 1
        for result in found:
            assert result["norms"], result
            assert result["rows"], result
            assert "weight must be gathered before it is used" in result["refused"]
    empty = [[result["empty"] for result in found] for found in results]
    assert not any(empty[0])
    # gate has two rows, so the third rank has none of it.
    assert [r["name"] for r in results[2] if r["empty"]] == ["1.gate", "2.gate"] * 2
