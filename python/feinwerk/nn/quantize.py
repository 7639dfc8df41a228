"""quantize_model: replaces the dense Linears of a model by NF4Linear, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.nf4_embedding import NF4Embedding
from feinwerk.nn.nf4_linear import NF4Linear
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.nn.places import Place, matches, places_of
from feinwerk.weight import NF4Weight

_OP = "quantize_model"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class QuantizedLayer:
    """One weight that was quantized: where it is, its shape, and its bytes before and after."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizeReport:
    """What quantize_model did. `bytes_*` count every parameter and buffer of the model once.

    `skipped` gives the reason for each dense matrix that is left; `unused_skips` lists the entries
    of `skip` that matched no module.
    """

    layers: list[QuantizedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused_skips: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        """Summarize for people: the sizes in MiB, then each skipped matrix with its reason."""
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        lines = [f"{len(self.layers)} weights in NF4, model {before:.1f} MiB -> {after:.1f} MiB"]
        lines += [f"  left dense: {name} ({reason})" for name, reason in self.skipped.items()]
        lines += [f"  skip entry matched nothing: {entry}" for entry in self.unused_skips]
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    *,
    skip: Iterable[str] = ("lm_head",),
    double_quant: bool = True,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
    embeddings: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Replace every torch.nn.Linear of `model` by an NF4Linear, in place.

    Layer by layer: beside the source, only the NF4 copy of the current layer (0.57 bytes an
    element at most) and a fixed workspace exist, and each source layer is dropped before the next
    is read. Layers that share one weight keep sharing one. Only the exact types torch.nn.Linear
    (and torch.nn.Embedding) are replaced; whatever dense matrix is left is in the report with the
    reason.

    A model on the meta device gets empty NF4 layers, to load a quantized checkpoint into:
    `quantize_model(model)`, then `model.load_state_dict(state, assign=True)`.

    Args:
        model: any module that contains the layers.
        skip: what stays dense: a run of dotted name parts ("lm_head", "layers.0", "mlp.gate") or
            a pattern for the whole name ("*.down_proj").
        double_quant: also quantize absmax.
        blocksize: elements per absmax, 32 to 4096.
        rule: "cpu" or "cuda", whose rounding decisions are followed.
        allow_non_finite: pass NaN and infinity on as bitsandbytes does.
        embeddings: also replace every torch.nn.Embedding, by NF4Embedding. An lm_head that is tied
            to the embedding can only be quantized together with it.
        progress: called as progress(done, total, name) after each weight.

    Returns:
        The report: layers, what was skipped and why, bytes before and after.

    Raises:
        TypeError: if `skip` is one string or `progress` cannot be called, or a weight to quantize
            is not fp32, bf16 or fp16; nothing has been changed then.
        ValueError: if blocksize or rule is unknown or `model` is itself a layer to replace
            (nothing has been changed then), or if a weight is not finite (the layers before it are
            NF4 then, it and the rest are as they were).

    Source:
        QLoRA (arXiv 2305.14314), section 3.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> len(quantize_model(model).layers)
        2
    """
    if isinstance(skip, str):
        _checks.reject(TypeError, _OP, "skip", "be a tuple or list of names", repr(skip))
    if progress is not None and not callable(progress):
        kind = type(progress).__name__
        _checks.reject(TypeError, _OP, "progress", "be a callable or None", kind)
    _checks.blocksize(_OP, blocksize)
    _checks.rule(_OP, rule)
    if type(model) in (nn.Linear, nn.Embedding):
        rule_text = "contain the layers to replace (for a single one: NF4Linear.from_linear)"
        _checks.reject(ValueError, _OP, "model", rule_text, type(model).__name__)

    skip = tuple(skip)
    report = QuantizeReport(bytes_before=_model_bytes(model))
    groups = _plan(model, skip, embeddings, report)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    report.unused_skips = [e for e in skip if not any(matches(e, name) for name in names)]
    for done, places in enumerate(groups, start=1):
        report.layers.append(
            _replace(
                places, blocksize=blocksize, double_quant=double_quant, rule=rule,
                allow_non_finite=allow_non_finite,
            )
        )  # fmt: skip
        if progress is not None:
            progress(done, len(groups), places[0].name)
    report.bytes_after = _model_bytes(model)
    return report


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every NF4Linear and NF4Embedding of `model` by its dense layer, in place.

    The way to merge an adapter with stock PEFT: dequantize the base, then merge into it.

    Args:
        model: any module that contains NF4 layers, a PEFT model included.
        dtype: of the dense weights; default each layer's `dtype`.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: if dtype is not torch.float32, torch.bfloat16 or torch.float16.
        ValueError: if `model` is itself an NF4 layer.

    Source:
        docs/ops/nf4_dequantize.md.

    Example:
        >>> model = nn.Sequential(NF4Linear(64, 8))
        >>> dequantize_model(model)
        ['0']
    """
    if dtype is not None:
        _checks.out_dtype("dequantize_model", dtype)
    if isinstance(model, NF4Module):
        rule = "contain the layers to replace (for a single one: to_linear())"
        _checks.reject(ValueError, "dequantize_model", "model", rule, type(model).__name__)
    # The ids are taken while every weight is alive, so that none stands for two.
    plan = [
        (place, id(place.module.weight))
        for place in places_of(model)
        if isinstance(place.module, NF4Module)
    ]
    dense: dict[int, nn.Parameter] = {}
    for place, tie in plan:
        layer = place.module
        assert isinstance(layer, (NF4Linear, NF4Embedding))
        if tie not in dense:
            dense[tie] = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
        setattr(place.parent, place.attribute, layer.with_dense_weight(dense[tie]))
    return [place.name for place, _ in plan]


def _plan(
    model: nn.Module, skip: tuple[str, ...], embeddings: bool, report: QuantizeReport
) -> list[list[Place]]:
    """Group the places to replace by weight; note in the report why every other matrix stays."""
    groups: dict[int, list[Place]] = {}
    reasons: dict[int, tuple[str, str]] = {}
    for place in places_of(model):
        module = place.module
        for key, parameter in module._parameters.items():
            if not _is_dense_matrix(parameter):
                continue
            reason = _reason_to_skip(place, module, skip, embeddings) if key == "weight" else ""
            if key != "weight":
                reason = f"{type(module).__name__}.{key}: only Linear weights are quantized"
            if reason:
                name = place.name if key == "weight" else f"{place.name}.{key}"
                reasons.setdefault(id(parameter), (name, reason))
                report.skipped[name] = reason
            else:
                groups.setdefault(id(parameter), []).append(place)
    for key, parameter in model._parameters.items():
        if _is_dense_matrix(parameter):
            reason = "a parameter of the model itself: only Linear weights are quantized"
            report.skipped[key] = reason
            reasons.setdefault(id(parameter), (key, reason))

    # A weight that also stays dense elsewhere would end up in memory twice.
    for tie in [tie for tie in groups if tie in reasons]:
        for place in groups.pop(tie):
            report.skipped[place.name] = f"tied to {reasons[tie][0]}, which stays dense"
    for places in groups.values():
        _check_source(places[0])
    return list(groups.values())


def _is_dense_matrix(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and parameter.dim() >= 2 and parameter.is_floating_point()


def _reason_to_skip(
    place: Place, module: nn.Module, skip: tuple[str, ...], embeddings: bool
) -> str:
    """Why the weight of this module stays dense; empty if it is to be quantized."""
    kind = type(module)
    if any(matches(entry, place.name) for entry in skip):
        return "in skip"
    if kind is nn.Embedding:
        if not embeddings:
            return "Embedding: quantized only with embeddings=True"
        if module.max_norm is not None:
            return "Embedding with max_norm, which rewrites its rows"
    elif kind.__name__ == "Conv1D":
        return "Conv1D holds its weight as [in, out]; NF4Linear needs [out, in]"
    elif kind is not nn.Linear:
        known = "a subclass of torch.nn.Linear" if isinstance(module, nn.Linear) else "no Linear"
        return f"{kind.__name__} is {known}"
    if isinstance(place.parent, nn.TransformerEncoderLayer):
        return "torch.nn.TransformerEncoderLayer reads this weight around the layer's forward"
    if "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks or a replaced forward, which a new layer would lose"
    return ""


def _check_source(place: Place) -> None:
    weight = place.module.weight
    assert isinstance(weight, torch.Tensor)
    name = f"{place.name}.weight"
    _checks.floating(_OP, name, weight)
    if weight.numel() == 0:
        _checks.reject(ValueError, _OP, name, "have elements", tuple(weight.shape))


def _replace(places: list[Place], **options: Any) -> QuantizedLayer:
    """Quantize the one weight of these places and put a new layer into each."""
    name = places[0].name
    source = places[0].module.weight
    assert isinstance(source, torch.Tensor)
    before = source.nbytes
    try:
        weight = NF4Weight.from_dense(source, **options)
    except ValueError as error:
        raise ValueError(f"{_OP}: {name}.weight: {error}") from error
    made: dict[int, NF4Module] = {}
    for place in places:
        old = place.module
        new = made.get(id(old))
        if new is None:
            if isinstance(old, nn.Linear):
                new = NF4Linear.from_weight(weight, old.bias)
            else:
                assert isinstance(old, nn.Embedding)
                new = NF4Embedding.from_weight(weight, old.padding_idx)
            made[id(old)] = new.train(old.training)
            # What other libraries have noted on the layer stays with it.
            for key, value in vars(old).items():
                vars(new).setdefault(key, value)
            weight = new.nf4_weight  # its packed is the Parameter that tied layers share
        setattr(place.parent, place.attribute, new)
    rows, columns = weight.shape
    return QuantizedLayer(name, (rows, columns), before, weight.nbytes)


def _model_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
