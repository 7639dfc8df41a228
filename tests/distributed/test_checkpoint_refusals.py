"""Another model, another optimizer, wrong arguments: refused by name, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk.distributed import (
    MismatchedCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from feinwerk.optim import AdamW
from tests.distributed.checkpoint_cases import OPTIONS, digest, tiny_model, tiny_optimizer, train


def changed(change: Any, **options: Any) -> tuple[nn.Module, AdamW]:
    model = tiny_model()
    model[2].requires_grad_(True)
    change(model)
    return model, tiny_optimizer(model, **options)


def _replace(model: nn.Module, layer: nn.Module) -> None:
    model[0] = layer


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m.requires_grad_(True), {"state_bits": 32}, "state_bits of group 0 is 8 in"),
        (lambda m: None, {"blocksize": 16}, "blocksize of group 0 is 8 in the checkpoint and 16"),
        (lambda m: None, {"layout": "flat"}, "layout of group 0 is 'rows' in the checkpoint"),
        (
            lambda m: m[2].bias.requires_grad_(False),
            {},
            "unexpected in the checkpoint: model.2.bias, 2.bias of parameter group 0",
        ),
        (
            lambda m: _replace(m, nn.Linear(12, 7, bias=False)),
            {},
            "unexpected in the checkpoint: model.0.bias, 0.bias of parameter group 0",
        ),
        (
            lambda m: m.append(nn.LayerNorm(3)),
            {},
            "missing in the checkpoint: model.3.bias, model.3.weight, 3.bias of parameter group",
        ),
        (
            lambda m: _replace(m, nn.Linear(13, 7)),
            {},
            r"different: model.0.weight is float32 \[7, 12\] in the checkpoint and float32 "
            r"\[7, 13\] here, optimizer.0.weight.exp_avg_codes",
        ),
        (lambda m: m.bfloat16(), {}, "model.0.weight is float32 .* and bfloat16"),
    ],
    ids=["bits", "blocksize", "layout", "frozen", "no bias", "more", "wider", "bf16"],
)
def test_another_model_or_optimizer_is_refused(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    model, optimizer = changed(lambda m: None)
    train(model, optimizer, 0, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer)
    other, another = changed(change, **options)
    before = digest(other, another)
    with pytest.raises(MismatchedCheckpoint, match=message) as caught:
        load_checkpoint(path, other, another)
    assert caught.value.path == str(path)
    assert digest(other, another) == before
    assert not another.state


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    path = save_checkpoint(tmp_path, 1, model, tiny_optimizer(model))
    weight, bias = model[0].weight, model[0].bias
    for groups, message in (
        ([{"params": [weight]}, {"params": [bias]}], "1 parameter groups in the checkpoint and 2"),
        ([bias, weight], "different: the order of the parameters in group 0"),
        ([weight], "unexpected in the checkpoint: 0.bias of parameter group 0"),
    ):
        with pytest.raises(MismatchedCheckpoint, match=message):
            load_checkpoint(path, model, AdamW(groups, **OPTIONS))


def test_arguments_that_break_their_rules(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)

    def refused(error: type[Exception], message: str, step: Any = 1, **options: Any) -> None:
        with pytest.raises(error, match=message):
            save_checkpoint(tmp_path / "none", step, model, optimizer, **options)
        assert not (tmp_path / "none").exists()

    refused(TypeError, "save_checkpoint: step must be an int, got float", step=1.0)
    refused(TypeError, "save_checkpoint: step must be an int, got bool", step=True)
    refused(ValueError, "save_checkpoint: step must be at least 0, got -1", step=-1)
    refused(ValueError, "save_checkpoint: keep must be at least 1, or None, got 0", keep=0)
    refused(ValueError, "save_checkpoint: timeout must be a positive number", timeout=0)
    refused(ValueError, 'parameters must be "trainable" or "all"', parameters="some")
    refused(TypeError, r"scheduler must have a state_dict\(\)", scheduler=3)
    optimizer.state[model[0].bias]["step"] = 3
    refused(TypeError, r"optimizer.state of 0.bias\['step'\] must be a torch.Tensor, got int")
    optimizer.state[model[0].bias] = {"a.b": torch.ones(1)}
    refused(ValueError, "the names in optimizer.state of 0.bias must be text without dots")
    del optimizer.state[model[0].bias]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    refused(ValueError, r"param_groups\[1\]\['params'\]\[0\] must be a parameter of the model")
