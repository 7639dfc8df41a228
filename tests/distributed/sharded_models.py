"""Models over NF4 for the tests of sharding, plain and under fully_shard, and a short training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from feinwerk import quantize_model
from feinwerk.distributed import ShardReport, shard_nf4
from feinwerk.nn import add_adapters
from feinwerk.optim import AdamW

VOCABULARY = 33


class Block(nn.Module):
    """Weights of 192, 64, 2 and 64 rows; the last one's blocks cross rows (K = 60)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 192), nn.Linear(192, 64)
        self.gate, self.odd = nn.Linear(64, 2), nn.Linear(60, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        gate = self.gate(h).sigmoid().mean(dim=-1, keepdim=True)
        return x + gate * self.down(F.gelu(self.up(h))) + self.odd(h[..., :60])


def base_model(*, double_quant: bool = True, seed: int = 0) -> nn.Module:
    """All of it in NF4, embedding and head of 33 rows as well: uneven over 2 ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, 64), Block(), Block(), nn.LayerNorm(64), nn.Linear(64, VOCABULARY)
    )
    quantize_model(model, skip=(), embeddings=True, double_quant=double_quant)
    return model


def adapted_model(*, dora: bool = False, double_quant: bool = True, **options: Any) -> nn.Module:
    """The base with adapters on every linear layer, B and A far from zero."""
    model = base_model(double_quant=double_quant)
    add_adapters(model, 4, lora_alpha=8, dora=dora, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model


def shard(model: Any, mesh: DeviceMesh, *, ignore: bool = True, **options: Any) -> ShardReport:
    """shard_nf4, then fully_shard on the blocks and the rest, as the guide has it."""
    report = shard_nf4(model, mesh)
    options["mesh"] = mesh
    if ignore:
        options["ignored_params"] = report.ignored_params
    for block in model:
        if isinstance(block, Block):
            fully_shard(block, **options)
    fully_shard(model, **options)
    return report


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """The loss of one batch; the same for the same seed."""
    tokens = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(tokens).float(), (7 * tokens + 1) % VOCABULARY)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the full tensor on every rank; a collective for a DTensor."""
    full: Any = tensor.detach()
    result: torch.Tensor = full.full_tensor() if hasattr(full, "full_tensor") else full
    return result.clone()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trained(model).items():
        assert parameter.grad is not None, name
        found[name] = whole(parameter.grad)
    return found


def train(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of some steps of AdamW, and the trained parameters after them, whole."""
    optimizer = AdamW(trained(model).values(), lr=1e-2, min_quantized_numel=512)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: whole(parameter) for name, parameter in trained(model).items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
