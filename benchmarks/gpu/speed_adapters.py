"""A training step of LoRA and DoRA on a GPU, beside PEFT's layers and the frozen base alone.

A step is a forward and the gradients of x, A, B and DoRA's magnitude. Adapters are fp32, as PEFT
makes them; its bf16 adapters are beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peft_peers
from benchmarks.adapters import RANK, SCALING, Adapter, Layer, compare_norms, plain, step
from benchmarks.gpu import cases, peers
from benchmarks.gpu.cases import Case
from benchmarks.gpu.checks_large import dense_of
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Contender, paired
from benchmarks.gpu.weights import dense_copies, make_weight, nested_of, nf4_copies
from feinwerk import (
    NF4Weight,
    dora_linear,
    grouped_lora_linear,
    lora_linear,
    row_norms,
    weight_norm,
)

GROUP = 8
CHECKED_ROWS = 256
Weight = NF4Weight | torch.Tensor
Trained = Sequence[torch.Tensor]


def lora(device: Device, case: Case) -> dict[str, Any]:
    """Check and time one LoRA case; a record for the results file."""
    return adapted(device, case, dora=False)


def dora(device: Device, case: Case) -> dict[str, Any]:
    """Check and time one case of DoRA, of grouped adapters or of the norm alone."""
    if case.op == "weight_norm":
        return norms(device, case)
    return adapted(device, case, dora="DoRA" in case.what)


class Setting:
    """A layer's copies and adapters, and the activations of a step.

    Args:
        device: where.
        case: what is timed.
        dora: with a magnitude.
    """

    def __init__(self, device: Device, case: Case, dora: bool) -> None:
        N, K, M = case.sizes(device.dry)
        # Rows of a batch in which every adapter has its part.
        self.N, self.K, self.M = N, K, M // GROUP * GROUP
        self.dropout = 0.1 if "dropout" in case.what else 0.0
        quantized = make_weight(device.torch, N, K)
        self.dense = dense_of(quantized, torch.bfloat16)
        self.weights: Sequence[Weight] = (
            nf4_copies(device, quantized)
            if "NF4" in case.what
            else dense_copies(device, self.dense)
        )
        self.generator = torch.Generator(device.torch).manual_seed(1)
        self.device = device.torch
        self.x = self.normal(self.M, K).to(torch.bfloat16).requires_grad_()
        self.dy = self.normal(self.M, N).to(torch.bfloat16)
        self.seed = torch.tensor(1234, device=device.torch)
        with torch.no_grad():
            self.norm = row_norms(self.dense)
            self.with_magnitude = dora
            self.adapter = self.make()

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers, reproducible."""
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def make(self) -> Adapter:
        """An adapter some way into training, B not zero."""
        A = self.normal(RANK, self.K) / self.K**0.5
        B = self.normal(self.N, RANK) / (4 * RANK**0.5)
        gain = 1 + 0.1 * self.normal(self.N)
        magnitude = gain * self.norm if self.with_magnitude else None
        return Adapter(A, B, magnitude)

    def contender(
        self, name: str, layers: Sequence[tuple[Layer, Trained]], graph: bool = True
    ) -> Contender:
        """Steps through layers in turn, each with the tensors whose gradients it computes."""
        calls = [
            functools.partial(step, layer, self.x, self.dy, trained) for layer, trained in layers
        ]
        return Contender(name, calls, graph)


def tables(weight: Weight) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weight and the keywords that say how it is quantized."""
    if isinstance(weight, torch.Tensor):
        return weight, {}
    names = ("nested_absmax", "nested_codebook", "nested_offset")
    nested = dict(zip(names, nested_of(weight), strict=True))
    return weight.packed, {"absmax": weight.absmax, "blocksize": weight.blocksize, **nested}


def leaves(adapter: Adapter) -> Adapter:
    """The adapter in memory of its own, to be trained."""
    return Adapter(*(t.detach().clone().requires_grad_() for t in adapter.tensors))


def our_layer(setting: Setting, weight: Weight, dropout: float = 0.0) -> tuple[Layer, Trained]:
    """lora_linear or dora_linear on this weight, and what it trains."""
    packed, quantized = tables(weight)
    one = leaves(setting.adapter)
    given: dict[str, Any] = {"weight": packed, "lora_A": one.A, "lora_B": one.B, **quantized}
    given |= {"scaling": SCALING, "dropout_p": dropout, "seed": setting.seed if dropout else None}
    if one.magnitude is None:
        return functools.partial(lora_linear, **given), one.tensors
    given |= {"magnitude": one.magnitude, "base_norm": setting.norm}
    return functools.partial(dora_linear, **given), one.tensors


def our_lora(setting: Setting, weight: Weight) -> tuple[Layer, Trained]:
    """The same adapters without magnitude, dropout or groups."""
    packed, quantized = tables(weight)
    one = leaves(Adapter(setting.adapter.A, setting.adapter.B))
    layer = functools.partial(
        lora_linear, weight=packed, lora_A=one.A, lora_B=one.B, scaling=SCALING, **quantized
    )
    return layer, one.tensors


def grouped_layer(setting: Setting, weight: Weight) -> tuple[Layer, Trained]:
    """GROUP adapters, each with as many rows, which lie together."""
    packed, quantized = tables(weight)
    made = [leaves(setting.make()) for _ in range(GROUP)]
    index = torch.arange(GROUP, device=setting.device).repeat_interleave(setting.M // GROUP)
    A, B = [one.A for one in made], [one.B for one in made]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return grouped_lora_linear(x, packed, A, B, index, scaling=[SCALING] * GROUP, **quantized)

    return layer, [*A, *B]


def frozen(weight: Weight) -> tuple[Layer, Trained]:
    """The base alone: y and dX."""
    if isinstance(weight, torch.Tensor):
        return functools.partial(F.linear, weight=weight), ()
    return weight.linear, ()


def peft_layer(setting: Setting, weight: Weight, dtype: torch.dtype) -> tuple[Layer, Trained]:
    """PEFT's own layer over the same base: bitsandbytes' Linear4bit for NF4."""
    dense = isinstance(weight, torch.Tensor)
    base = peers.linear(weight) if dense else peers.linear4bit(weight)
    layer = peft_peers.lora_layer(base, [setting.adapter], adapter_dtype=dtype)
    layer.to(setting.device)
    return layer, peft_peers.trained(layer, "0")


def adapted(device: Device, case: Case, dora: bool) -> dict[str, Any]:
    """Ours, PEFT's and the base's step over one weight."""
    with device.backend():
        setting = Setting(device, case, dora)
        weights = setting.weights
        grouped = "grouped" in case.what
        if grouped:
            mine = [grouped_layer(setting, w) for w in weights]
        else:
            mine = [our_layer(setting, w, setting.dropout) for w in weights]
        # The adapters of the rows are read on the host.
        ours = setting.contender("feinwerk", mine, graph=not grouped)
        results = ours.calls[0]()
        if not setting.dropout and not grouped:
            check(setting, results)
        missing: dict[str, str] = {}

        def peer(name: str, make: Callable[[Weight], tuple[Layer, Trained]]) -> list[Contender]:
            def build() -> Contender:
                made = setting.contender(name, [make(w) for w in weights])
                if name in (cases.PEFT, cases.PEFT_HALF):
                    for theirs, other in zip(made.calls[0](), results, strict=True):
                        peers.same(made, theirs, other)
                return made

            return peers.timed(missing, case.wants(name), build, name)

        full, half = torch.float32, torch.bfloat16
        others = [
            *peer(cases.BASE, frozen),
            *peer(cases.LORA, lambda w: our_lora(setting, w)),
            *peer(cases.PEFT, lambda w: peft_layer(setting, w, full)),
            *peer(cases.PEFT_HALF, lambda w: peft_layer(setting, w, half)),
        ]
        workspace = device.extra_bytes(ours.calls[0])
        record = paired(device, ours, *others, seconds=0.6)
    low_rank = setting.M * RANK * (setting.N + setting.K)
    operations = 4 * setting.M * setting.N * setting.K + 6 * low_rank
    return record | {
        "missing": missing, "workspace_bytes": workspace, "operations": operations,
        "copies": len(weights),
    }  # fmt: skip


def check(setting: Setting, results: Sequence[torch.Tensor]) -> None:
    """Raise AssertionError unless y and all gradients are within the budget, as norms, in fp64."""
    N, K, M = setting.N, setting.K, setting.M
    values = []
    for dtype, sizes in ((torch.float64, False), (torch.bfloat16, False), (torch.float64, True)):
        layer, trained = plain(setting.dense, leaves(setting.adapter), dtype, sizes=sizes)
        x, dy = setting.x.detach().to(dtype), setting.dy.to(dtype)
        if sizes:
            x, dy = x.abs(), dy.abs()
        values.append(step(layer, x.clone().requires_grad_(), dy, trained))
    depths = {"y": K + RANK, "dX": N + RANK, "dA": N + M, "dB": K + M, "dm": K + RANK + M}
    for (name, depth), mine, *others in zip(depths.items(), results, *values, strict=False):
        compare_norms(name, mine.detach(), *(t.detach() for t in others), depth=depth)


def norms(device: Device, case: Case) -> dict[str, Any]:
    """The factored norm alone, W in bf16."""
    N, K, _ = case.sizes(device.dry)
    with device.backend(), torch.no_grad():
        setting = Setting(device, Case(case.part, case.op, "over NF4", N, K, GROUP), False)
        one = setting.adapter
        given = {"scaling": SCALING, "base_norm": setting.norm, "dtype": torch.bfloat16}
        calls = []
        for weight in setting.weights:
            packed, quantized = tables(weight)
            calls.append(functools.partial(weight_norm, packed, one.A, one.B, **quantized, **given))
        record = paired(device, Contender("feinwerk", calls))
        nbytes = sum(w.nbytes for w in setting.weights) // len(setting.weights)
    return record | {"missing": {}, "bytes": nbytes, "operations": 2 * N * K * RANK}
