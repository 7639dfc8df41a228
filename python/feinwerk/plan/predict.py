"""plan: how much memory a fine-tune takes on each rank, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from feinwerk import _checks
from feinwerk.plan.architecture import OP, Architecture, architecture
from feinwerk.plan.fit import Fit, find_fit
from feinwerk.plan.settings import ALL_LINEAR, Settings, check
from feinwerk.plan.sizes import parse
from feinwerk.plan.table import text_table

RESERVED_SHARE = 0.05


@dataclass(frozen=True)
class Part:
    """One use of memory on a rank.

    Attributes:
        name: what it is for.
        bytes: at its most.
        at_peak: at the moment when all parts together are largest.
        note: how many, of what kind.
    """

    name: str
    bytes: int
    at_peak: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What `plan` predicts, in bytes a rank; print it for a table.

    Attributes:
        settings: what was asked.
        model: the architecture.
        parts: every use of memory.
        moment: of the step, when the peak is reached.
        trained: number of trained parameters.
        fit: how it stands with the memory that was given, or None.
    """

    settings: Settings
    model: Architecture
    parts: tuple[Part, ...]
    moment: str
    trained: int
    fit: Fit | None = field(default=None)

    @property
    def peak(self) -> int:
        """The most that is used at once."""
        return sum(part.at_peak for part in self.parts)

    def part(self, name: str) -> Part:
        """A part by name: "weights", "states", ..."""
        return next(part for part in self.parts if part.name == name)

    @property
    def weights(self) -> int:
        """Of the model's own weights."""
        return self.part("weights").bytes

    @property
    def adapters(self) -> int:
        """Of the adapters, with DoRA's norms."""
        return self.part("adapters").bytes

    @property
    def gradients(self) -> int:
        """Of all gradients, and of their sums over ranks."""
        return self.part("gradients").bytes

    @property
    def states(self) -> int:
        """Of the optimizer's states: exact."""
        return self.part("optimizer states").bytes

    @property
    def activations(self) -> int:
        """Of what the layers keep for the backward."""
        return self.part("activations").bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": dataclasses.asdict(self.model) | {"parameters": self.model.parameters},
            "trained": self.trained,
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "peak": self.peak,
            "moment": self.moment,
            "fit": None if self.fit is None else dataclasses.asdict(self.fit),
        }

    def __str__(self) -> str:
        """Return the parts as a table, and how it fits."""
        return text_table(self)


def plan(
    model: Any,
    *,
    method: str = "qlora",
    r: int = 16,
    targets: str | Sequence[str] = ALL_LINEAR,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    batch: int = 1,
    seq: int = 2048,
    world_size: int = 1,
    stage: int | None = None,
    rank: int = 0,
    state_bits: int = 8,
    blocksize: int = 256,
    min_quantized_numel: int = 4096,
    bf16_params: str = "remainder",
    nf4_blocksize: int = 64,
    double_quant: bool = True,
    attention: str = "sdpa",
    checkpointing: bool = False,
    accumulate: bool = False,
    dropout: float = 0.0,
    bucket_mb: float = 25.0,
    device: str = "cpu",
    memory: str | float | None = None,
    reserve: str | float | None = None,
) -> Plan:
    """Predict the memory of a fine-tune, part by part and in bytes a rank; nothing is loaded.

        peak = weights + adapters + states + buffers                                      always
               + max over the step of (saved activations + loss + gradients + temporaries)

    Use it before renting a machine, or to find the batch, stage or state bits that fit one.
    Weights, adapters, gradients and states are exact; what is saved for the backward is counted
    tensor by tensor for transformers' model on Feinwerk's fused adapters; the peak is within 10 %
    of what the allocator counts. docs/guides/plan.md says what is left out.

    Args:
        model: the name of a preset ("llama-3.2-1b"), the path of a config.json or of its folder, a
            config as a dict or of transformers, or a model of transformers. Types: llama, mistral,
            phi3, qwen2, qwen3.
        method: "full", "lora", "rslora", "dora", "qlora" or "qdora"; a leading q holds the Linears
            of the layers in NF4.
        r: rank of the adapters.
        targets: names of Linears that get an adapter, or "all-linear": all but the head.
        dtype: "bfloat16" or "float32", of dense weights and activations.
        adapter_dtype: of the adapters; PEFT's is "float32".
        batch: sequences of a step on one rank.
        seq: tokens of a sequence, without padding.
        world_size: number of ranks.
        stage: 0 replicates all (DDP), 1 and 2 are `ShardedAdamW`'s, 3 is `fully_shard` with
            `AdamW`; default 2 for several ranks.
        rank: the rank to plan for; rank 0 has the most rows.
        state_bits: of AdamW's moments: 8, 16 or 32.
        blocksize: elements an absmax of 8-bit states.
        min_quantized_numel: matrices with fewer elements have fp32 states.
        bf16_params: "remainder" or "stochastic", for trained parameters in bf16.
        nf4_blocksize: weights an absmax of NF4.
        double_quant: whether that absmax is quantized.
        attention: "sdpa" or "eager", as transformers calls them.
        checkpointing: keep a layer's input only and recompute the rest in the backward.
        accumulate: gradients of earlier micro-batches are there already.
        dropout: of the adapters.
        bucket_mb: as `ShardedAdamW` takes it.
        device: "cpu" or "cuda": where NF4 kernels work without Triton decodes whole weights.
        memory: of one device, such as "24GB"; then `fit` says what fits.
        reserve: of it, not for tensors: allocator gaps, CUDA context, interpreter. Default 5 %.

    Returns:
        The plan.

    Raises:
        TypeError: if `model` is no model, or a number is none.
        ValueError: if the model or a choice is unknown, a value breaks its rule, or the stage
            does not go with the world size.

    Source:
        ZeRO (arXiv 1910.02054), section 3; docs/guides/plan.md.

    Example:
        >>> found = plan("llama-3-8b", method="qdora", seq=2048, batch=4, memory="24GB")
        >>> found.fit.fits, found.fit.batch
        (False, 0)
    """
    if stage is None:
        stage = 0 if world_size == 1 else 2
    chosen = targets if isinstance(targets, str) else tuple(targets)
    settings = Settings(
        method=method, r=r, targets=chosen, dtype=dtype, adapter_dtype=adapter_dtype, batch=batch,
        seq=seq, world_size=world_size, stage=stage, rank=rank, state_bits=state_bits,
        blocksize=blocksize, min_quantized_numel=min_quantized_numel, bf16_params=bf16_params,
        nf4_blocksize=nf4_blocksize, double_quant=double_quant, attention=attention,
        checkpointing=checkpointing, accumulate=accumulate, dropout=dropout, bucket_mb=bucket_mb,
        device=device,
    )  # fmt: skip
    arch = architecture(model)
    check(settings, arch)
    found = predict(arch, settings)
    if memory is None:
        if reserve is not None:
            _checks.reject(ValueError, OP, "reserve", "be left out without memory", reserve)
        return found
    given = parse("memory", memory)
    kept = int(RESERVED_SHARE * given) if reserve is None else parse("reserve", reserve)
    if kept >= given:
        _checks.reject(ValueError, OP, "reserve", f"be below memory = {given}", kept)

    def peak(other: Settings) -> int:
        return predict(arch, other).peak

    return dataclasses.replace(found, fit=find_fit(settings, given, kept, peak))


def predict(model: Architecture, settings: Settings) -> Plan:
    """Return the plan of checked settings."""
    # Here, because they bring the optimizers along, which `import feinwerk` does without.
    from feinwerk.plan import moments, resident
    from feinwerk.plan.workspace import workspace

    transfers = resident.transfers(model, settings)
    space = workspace(model, settings)
    found = moments.moments(model, settings, transfers, space)
    highest = max(found, key=lambda moment: moment.total)
    trained = sum(tensor.numel for tensor in resident.trained_tensors(model, settings))

    def always(name: str, size: int, note: str = "") -> Part:
        return Part(name, size, size, note)

    def passing(name: str, field: str, note: str = "", more: int = 0) -> Part:
        sizes = [getattr(moment, field) for moment in found]
        return Part(name, max(sizes) + more, getattr(highest, field) + more, note)

    kind = "NF4" if settings.quantized else settings.dtype
    parts = [
        always("weights", resident.weights(model, settings), f"{model.parameters:,}, {kind}"),
        always(
            "adapters",
            resident.adapters(model, settings) if settings.adapted else 0,
            f"{trained:,}, {settings.adapter_dtype}" if settings.adapted else "",
        ),
        always("optimizer states", resident.states(model, settings), _states_note(settings)),
        passing("gradients", "gradients", _gradients_note(settings), transfers.sums),
        passing("activations", "activations", f"{settings.tokens:,} tokens"),
        passing("logits and loss", "loss", f"vocabulary {model.vocab_size:,}"),
        passing("temporaries", "temporaries", "of the backward of one layer"),
        passing("workspace", "workspace", "of the kernels", space.kept),
        passing("buckets", "sent", "sent and received", transfers.buffers),
        passing("gathered weights", "gathered", "whole while used"),
    ]
    shown = [part for part in parts if part.bytes or part.name in ("weights", "adapters")]
    return Plan(settings, model, tuple(shown), highest.name, trained)


def _states_note(settings: Settings) -> str:
    shared = f", 1/{settings.world_size} of the rows" if settings.stage else ""
    return f"{settings.state_bits}-bit moments{shared}"


def _gradients_note(settings: Settings) -> str:
    if settings.world_size == 1 or settings.stage == 0:
        return "whole"
    return {1: "whole, and sums of own rows", 2: "sums of own rows", 3: "own rows"}[settings.stage]
