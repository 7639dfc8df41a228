"""A Llama with PEFT's adapters over a sharded NF4 base, fused and not; what explain says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from feinwerk import explain, quantize_model
from feinwerk.distributed import shard_nf4
from tests.distributed.sharded_models import differing, gradients
from tests.optim.processes import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("peft")

KINDS = {"stock LoRA": (False, False), "fused LoRA": (True, False), "fused DoRA": (True, True)}


def llama(*, fused: bool, dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from feinwerk.integrations.peft import fuse

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=65, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    quantize_model(base)
    # down_proj has K = 160: its blocks of 64 cross rows.
    adapters = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_dora=dora, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(base, adapters)
    if fused:
        fuse(model)
    return model


def loss_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) * 5 % 65
    result: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return result


def train_llamas(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for kind, (fused, dora) in KINDS.items():
        plain, model = llama(fused=fused, dora=dora), llama(fused=fused, dora=dora)
        report = shard_nf4(model, mesh)
        before = str(explain(model))
        options: Any = {"mesh": mesh, "ignored_params": report.ignored_params}
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        losses, sharded_losses, different = [], [], []
        for _ in range(2):
            for one, seen in ((plain, losses), (model, sharded_losses)):
                loss = loss_of(one)
                loss.backward()
                seen.append(loss.item())
            different += differing(gradients(plain), gradients(model))
            for one in (plain, model):
                torch.optim.SGD([p for p in one.parameters() if p.grad is not None], 0.1).step()
                one.zero_grad()
        model.eval()
        with torch.no_grad():
            sharded_losses.append(loss_of(model).item())
            losses.append(loss_of(plain.eval()).item())
        found[kind] = {
            "losses": losses,
            "sharded losses": sharded_losses,
            "gradients": different,
            "replicated": report.replicated,
            "layers": len(report.layers),
            "before": before,
            "explain": {row.name: row for row in explain(model).rows},
            "plain": {row.name: (row.path, row.op) for row in explain(plain).rows},
        }
    return found


def test_peft_trains_on_a_sharded_base_and_explain_says_how() -> None:
    layer = "base_model.model.model.layers.1"
    why = "K = 160 is not a multiple of blocksize 64, so blocks cross rows"
    for found in run_ranks(train_llamas, 2, timeout=150):
        for kind, result in found.items():
            assert result["losses"] == result["sharded losses"], kind
            assert len(set(result["losses"])) == 3
            assert not result["gradients"], kind
            assert result["layers"] == 2 * 6
            assert result["replicated"] == {
                f"base_model.model.model.layers.{i}.mlp.down_proj.base_layer": why for i in (0, 1)
            }
            rows = result["explain"]
            assert {n: (row.path, row.op) for n, row in rows.items()} == result["plain"]
            assert "rows viewed for sharding, fully_shard not called" in result["before"]
            assert rows[f"{layer}.self_attn.k_proj"].why == (
                "the weight is in NF4; rows sharded over 2 ranks"
            )
            fused = rows[f"{layer}.mlp.up_proj"]
            assert fused.why.endswith("; rows sharded over 2 ranks")
            assert rows[f"{layer}.mlp.down_proj"].why.endswith(f"; on every rank: {why}")
            expected = {"stock LoRA": ("peft", ""), "fused LoRA": ("fused", "lora_linear"),
                        "fused DoRA": ("fused", "dora_linear")}[kind]  # fmt: skip
            assert (fused.path, fused.op) == expected
