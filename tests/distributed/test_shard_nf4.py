"""Training on an NF4 base that FSDP2 shards by rows: the bits of the unsharded model."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

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


def compare_training(rank: int, world_size: int) -> list[dict[str, Any]]:
    """The same batch on every rank, so that the mean over ranks is each rank's gradient."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for case in CASES:
        options = {key: case[key] for key in ("dora", "double_quant")}
        plain, sharded = adapted_model(**options), adapted_model(**options)
        shard(sharded, mesh, reshard_after_forward=case["reshard"])

        loss, sharded_loss = loss_of(plain), loss_of(sharded)
        loss.backward()
        sharded_loss.backward()
        mine, theirs = gradients(plain), gradients(sharded)
        # The sum over ranks, then its division: what a mean of equal summands rounds to.
        mean = {name: (world_size * gradient) / world_size for name, gradient in mine.items()}
        assert all(bool(gradient.any()) for gradient in mine.values())
        different = differing(mean, theirs)
        for model in (plain, sharded):
            model.zero_grad()

        losses, weights = train(plain)
        sharded_losses, sharded_weights = train(sharded)
        plain.eval(), sharded.eval()
        evaluated = []
        with torch.no_grad():
            for factor in (1.0, 0.5):
                # Nothing of B may be remembered: a write like this one has no version in the
                # gathered parameter.
                for model in (plain, sharded):
                    for name, parameter in trained(model).items():
                        if name.endswith("lora_B"):
                            parameter.mul_(factor)
                evaluated.append([loss_of(model, 9).item() for model in (plain, sharded)])
        found.append(
            {
                "case": case,
                "forward": loss.item() == sharded_loss.item(),
                "gradients": different,
                "losses": (losses, sharded_losses),
                "weights": differing(weights, sharded_weights),
                "evaluated": evaluated,
            }
        )
    return found


def test_two_ranks_train_as_one() -> None:
    for found in run_ranks(compare_training, 2, timeout=120):
        for result in found:
            assert result["forward"], result["case"]
            assert not result["gradients"], result["case"]
            losses, sharded_losses = result["losses"]
            assert losses == sharded_losses, result["case"]
            assert losses[-1] < losses[0]
            assert not result["weights"], result["case"]
            first, second = result["evaluated"]
            assert first[0] == first[1] != second[0] == second[1], result["case"]


def test_three_ranks_of_which_one_holds_no_row_of_a_weight() -> None:
    for found in run_ranks(compare_training, 3, timeout=120):
        for result in found:
            assert result["forward"], result["case"]
            # (3 g) / 3 is not always g, so weights part after the first step.
            assert not result["gradients"], result["case"]
