"""Training on an NF4 base that FSDP2 shards by rows: the bits of the unsharded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from feinwerk.nn import NF4Embedding, NF4Linear
from tests.distributed.sharded_models import (
    adapted_model,
    differing,
    gradients,
    loss_of,
    shard,
    train,
    trained,
)
from tests.optim.processes import run_ranks

CASES = [
    {"dora": dora, "double_quant": double_quant, "reshard": reshard}
    for dora, double_quant, reshard in [
        (False, True, True), (True, True, True), (True, False, True), (True, True, False),
        (False, False, False),
    ]
]  # fmt: skip


def compare_training(mesh: DeviceMesh) -> list[dict[str, Any]]:
    """The same batch on every rank, so that the mean over ranks is each rank's gradient."""
    found = []
    for case in CASES if mesh.size() == 2 else CASES[1:3]:
        options = {key: case[key] for key in ("dora", "double_quant")}
        plain, sharded = adapted_model(**options), adapted_model(**options)
        shard(sharded, mesh, reshard_after_forward=case["reshard"])

        loss, sharded_loss = loss_of(plain), loss_of(sharded)
        loss.backward()
        sharded_loss.backward()
        mine, theirs = gradients(plain), gradients(sharded)
        assert all(bool(gradient.any()) for gradient in mine.values())
        # The sum over ranks, then its division: what a mean of equal summands rounds to.
        size = mesh.size()
        different = differing({name: (size * g) / size for name, g in mine.items()}, theirs)
        found.append(
            {
                "case": case,
                "forward": loss.item() == sharded_loss.item(),
                "gradients": different,
            }
        )
        if size > 2:  # (3 g) / 3 is not always g: weights part after the first step
            continue
        for model in (plain, sharded):
            model.zero_grad()
        losses, weights = train(plain)
        sharded_losses, sharded_weights = train(sharded)
        found[-1] |= {
            "losses": (losses, sharded_losses),
            "weights": differing(weights, sharded_weights),
            "evaluated": evaluated(plain.eval(), sharded.eval()),
        }
    return found


@torch.no_grad()
def evaluated(*models: nn.Module) -> list[list[float]]:
    """Losses before and after a write into B, which counts no version where it is gathered."""
    found = []
    for factor in (1.0, 0.5):
        for model in models:
            for name, parameter in trained(model).items():
                if name.endswith("lora_B"):
                    parameter.mul_(factor)
        found.append([loss_of(model, 9).item() for model in models])
    return found


def batch_of_each_rank(mesh: DeviceMesh) -> list[str]:
    """Gradients that are not the mean of those of the two batches, computed one by one."""
    sharded = adapted_model(dora=True)
    shard(sharded, mesh)
    loss_of(sharded, seed=mesh.get_rank()).backward()
    parts = []
    for rank in range(mesh.size()):
        plain = adapted_model(dora=True)
        loss_of(plain, seed=rank).backward()
        parts.append(gradients(plain))
    assert differing(*parts)
    mean = {name: (g + parts[1][name]) / 2 for name, g in parts[0].items()}
    return differing(mean, gradients(sharded))


def policies(mesh: DeviceMesh) -> dict[str, bool]:
    """Whether a training under other machinery of FSDP2 ends with the same bits."""
    expected = train(adapted_model(dora=True))

    def same(model: Any) -> bool:
        losses, weights = train(model)
        return losses == expected[0] and not differing(weights, expected[1])

    offloaded, recomputed, compiled = (adapted_model(dora=True) for _ in range(3))
    shard(offloaded, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    for block in (recomputed[1], recomputed[2]):

        def again(x: torch.Tensor, forward: Any = block.forward) -> Any:
            return checkpoint(forward, x, use_reentrant=False)

        block.forward = again
    shard(recomputed, mesh)
    shard(compiled, mesh)
    for block in (compiled[1], compiled[2]):
        block.compile(backend="aot_eager")
    return {
        "offloaded": same(offloaded),
        "recomputed": same(recomputed),
        "compiled": same(compiled),
    }


def bytes_of(layer: NF4Linear | NF4Embedding) -> list[torch.Tensor]:
    """The flat codes and the bytes of absmax, copied."""
    return [
        layer.weight.detach().reshape(-1).clone(),
        layer.absmax.detach().reshape(-1).view(torch.uint8).clone(),
    ]


def watch(model: nn.Module) -> tuple[dict[str, list[torch.Tensor]], set[torch.dtype]]:
    """What some layers see of their base while a forward runs."""
    seen: dict[str, list[torch.Tensor]] = {}
    dtypes: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith(("up", "gate", "4")):

            def note(module: Any, args: Any, name: str = name) -> None:
                seen[f"{name}.base_layer"] = bytes_of(module.base_layer)
                dtypes.update({module.lora_A.dtype, module.base_layer.absmax.dtype})

            module.register_forward_pre_hook(note)
    return seen, dtypes


def mixed_precision(mesh: DeviceMesh) -> list[dict[str, Any]]:
    found = []
    for dora, double_quant in ((False, False), (True, True)):
        plain = adapted_model(dora=dora, double_quant=double_quant)
        sharded = adapted_model(dora=dora, double_quant=double_quant)
        shard(sharded, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        seen, dtypes = watch(sharded)
        before = {name: bytes_of(plain.get_submodule(name)) for name in
                  ("1.up.base_layer", "2.up.base_layer", "1.gate.base_layer", "2.gate.base_layer",
                   "4.base_layer")}  # fmt: skip
        sharded_loss, loss = loss_of(sharded), loss_of(plain.to(torch.bfloat16))
        sharded_loss.backward()
        loss.backward()
        found.append(
            {
                "changed": [
                    n for n, kept in before.items() if not all(map(torch.equal, seen[n], kept))
                ],
                "dtypes": sorted(map(str, dtypes)),
                "losses": (loss.item(), sharded_loss.item()),
                "gradients": differing(
                    {name: g.float() for name, g in gradients(plain).items()}, gradients(sharded)
                ),
            }
        )
    return found


def everything(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    found: dict[str, Any] = {"training": compare_training(mesh)}
    if world_size == 2:
        found["batch of each rank"] = batch_of_each_rank(mesh)
        found["policies"] = policies(mesh)
        found["mixed precision"] = mixed_precision(mesh)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(everything, 2, timeout=150)


def test_two_ranks_train_as_one(two_ranks: list[Any]) -> None:
    for found in two_ranks:
        assert len(found["training"]) == len(CASES)
        for result in found["training"]:
            assert result["forward"], result["case"]
            assert not result["gradients"], result["case"]
            losses, sharded_losses = result["losses"]
            assert losses == sharded_losses, result["case"]
            assert losses[-1] < losses[0]
            assert not result["weights"], result["case"]
            first, second = result["evaluated"]
            assert first[0] == first[1] != second[0] == second[1], result["case"]
        assert not found["batch of each rank"]


def test_three_ranks_of_which_one_holds_no_row_of_a_weight() -> None:
    for found in run_ranks(everything, 3, timeout=150):
        assert len(found["training"]) == 2
        for result in found["training"]:
            assert result["forward"], result["case"]
            assert not result["gradients"], result["case"]


@pytest.mark.parametrize("policy", ["offloaded", "recomputed", "compiled"])
def test_the_rest_of_fsdp2_goes_on_top(two_ranks: list[Any], policy: str) -> None:
    assert all(found["policies"][policy] for found in two_ranks)


def test_mixed_precision_casts_adapters_but_neither_codes_nor_absmax(two_ranks: list[Any]) -> None:
    for found in two_ranks:
        kinds = ("torch.float32", "torch.uint8")
        for result, absmax in zip(found["mixed precision"], kinds, strict=True):
            assert not result["changed"]
            assert result["dtypes"] == sorted(["torch.bfloat16", absmax])
            assert result["losses"][0] == result["losses"][1]
            assert not result["gradients"]
