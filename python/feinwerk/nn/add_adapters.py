"""add_adapters puts adapters into a model; the others list, mark, switch off and merge them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from feinwerk import _checks
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.lora import DoRALinear, LoRALinear, is_conv1d
from feinwerk.nn.lora_conv import DoRAConv, LoRAConv
from feinwerk.nn.lora_embedding import DoRAEmbedding, LoRAEmbedding
from feinwerk.nn.merge import MergeReport
from feinwerk.nn.nf4_embedding import NF4Embedding
from feinwerk.nn.nf4_linear import NF4Linear
from feinwerk.nn.places import Place, matches, places_of

# The linear layers that are adapted when no targets are named leave the head alone, as PEFT does.
_HEAD = "lm_head"


def adapter_class(layer: nn.Module, *, dora: bool = False) -> type[Adapter] | None:
    """Return the adapter for a layer; None for one that cannot have any.

    Args:
        layer: any module.
        dora: DoRA instead of LoRA.

    Returns:
        A subclass of Adapter.

    Example:
        >>> adapter_class(nn.Linear(2, 2)).__name__
        'LoRALinear'
    """
    kind = type(layer)
    if kind in (nn.Linear, NF4Linear) or is_conv1d(layer):
        return DoRALinear if dora else LoRALinear
    if kind in (nn.Embedding, NF4Embedding):
        return DoRAEmbedding if dora else LoRAEmbedding
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return DoRAConv if dora else LoRAConv
    return None


def add_adapters(
    model: nn.Module,
    r: int,
    *,
    lora_alpha: float,
    target_modules: Iterable[str] | None = None,
    dora: bool = False,
    trainable: Iterable[str] = (),
    **options: Any,
) -> list[str]:
    """Wrap layers of a model by adapters, in place, and freeze everything else.

    Args:
        model: any module that contains the layers.
        r: rank.
        lora_alpha: scaling is lora_alpha / r.
        target_modules: which layers: a run of dotted name parts ("q_proj", "layers.0") or a pattern
            for the whole name ("*.down_proj"). Linear layers (NF4Linear and transformers' Conv1D
            included), embeddings and convolutions can be named. Default: every linear layer but
            lm_head, as PEFT's "all-linear".
        dora: DoRA instead of LoRA.
        trainable: what else is trained whole, named in the same way ("classifier").
        options: of LoRALinear: use_rslora, dropout, lora_bias, init, iterations, dtype. Embeddings
            have no dropout, as in PEFT.

    Returns:
        The names of the wrapped layers, in model order.

    Raises:
        TypeError: if `target_modules` or `trainable` is one string, or an option is unknown.
        ValueError: if an entry matches no layer that can have an adapter, or an option does not fit
            a layer, which the message names. Nothing has been changed then.

    Source:
        LoRA (arXiv 2106.09685), section 4.2.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> add_adapters(model, 4, lora_alpha=8)
        ['0', '2']
    """
    return wrap(
        model, select(model, target_modules), dora=dora, trainable=trainable,
        options_of=lambda _: {"r": r, "lora_alpha": lora_alpha, **options},
    )  # fmt: skip


def select(model: nn.Module, target_modules: Iterable[str] | None) -> list[Place]:
    """Return the places that the entries name, each entry at least one."""
    op, name = "add_adapters", "target_modules"
    if isinstance(target_modules, str):
        _checks.reject(TypeError, op, name, "be a tuple or list of names", repr(target_modules))
    if isinstance(model, Adapter) or adapter_class(model) is not None:
        rule = "contain the layers to wrap (for a single one: LoRALinear and its like)"
        _checks.reject(ValueError, op, "model", rule, type(model).__name__)
    able = [
        place
        for place in places_of(model)
        if adapter_class(place.module) is not None and not isinstance(place.parent, Adapter)
    ]
    if target_modules is None:
        linear = (nn.Linear, NF4Linear)
        found = [
            place
            for place in able
            if (type(place.module) in linear or is_conv1d(place.module))
            and not matches(_HEAD, place.name)
        ]
    else:
        entries = tuple(target_modules)
        for entry in entries:
            if not any(matches(entry, place.name) for place in able):
                rule = "name layers that can have an adapter and have none"
                _checks.reject(ValueError, op, name, rule, repr(entry))
        found = [place for place in able if any(matches(e, place.name) for e in entries)]
    if not found:
        _checks.reject(ValueError, op, "model", "contain layers to wrap", type(model).__name__)
    for place in found:
        if isinstance(place.parent, nn.TransformerEncoderLayer):
            rule = "not be in a torch.nn.TransformerEncoderLayer, which reads weights past forward"
            _checks.reject(ValueError, op, name, rule, repr(place.name))
    return found


def wrap(
    model: nn.Module,
    places: list[Place],
    *,
    dora: bool,
    trainable: Iterable[str],
    options_of: Callable[[Place], dict[str, Any]],
    op: str = "add_adapters",
) -> list[str]:
    """Check every place with its options, then wrap them all; a shared layer is wrapped once."""
    if isinstance(trainable, str):
        rule = "be a tuple or list of names"
        _checks.reject(TypeError, op, "trainable", rule, repr(trainable))
    plan: list[tuple[Place, type[Adapter], dict[str, Any]]] = []
    for place in places:
        kind = adapter_class(place.module, dora=dora)
        assert kind is not None
        options = {k: v for k, v in options_of(place).items() if k not in kind.unused}
        try:
            kind.check(place.module, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: {place.name}: {error}") from error
        plan.append((place, kind, options))
    entries = tuple(trainable)
    _check_trainable(model, entries)
    for place in places:
        if any(matches(entry, f"{place.name}.weight") for entry in entries):
            rule = "not name layers that get an adapter"
            _checks.reject(ValueError, op, "trainable", rule, repr(place.name))
    made: dict[int, Adapter] = {}
    for place, kind, options in plan:
        layer = place.module
        if id(layer) not in made:
            made[id(layer)] = kind(layer, **options)
        setattr(place.parent, place.attribute, made[id(layer)])
    mark_trainable(model, entries)
    return [place.name for place in places]


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by name, in model order.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> adapters_of(model)
        {}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name: A, B, lora_bias and magnitude, not their bases'.

    Args:
        model: any module, or an adapter.

    Returns:
        Name to parameter, in model order.

    Example:
        >>> layer = LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8)
        >>> list(adapter_parameters(layer))
        ['lora_A', 'lora_B']
    """
    return {
        f"{name}.{key}".lstrip("."): parameter
        for name, module in adapters_of(model).items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def mark_trainable(model: nn.Module, also: Iterable[str] = ()) -> list[str]:
    """Train the adapters' parameters and nothing else, but what `also` names.

    Args:
        model: any module.
        also: names of parameters or modules: a run of dotted parts or a pattern.

    Returns:
        The names of the parameters that are trained.

    Raises:
        ValueError: if an entry of `also` matches no parameter or NF4 codes; nothing has been
            changed then.

    Example:
        >>> model = nn.Sequential(LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8), nn.Linear(8, 2))
        >>> mark_trainable(model, ["1"])
        ['0.lora_A', '0.lora_B', '1.weight', '1.bias']
    """
    entries = tuple(also)
    _check_trainable(model, entries)
    ours = {id(parameter) for parameter in adapter_parameters(model).values()}
    marked = []
    for name, parameter in model.named_parameters():
        wanted = id(parameter) in ours or any(matches(e, name) for e in entries)
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted)
        if wanted:
            marked.append(name)
    return marked


def _check_trainable(model: nn.Module, entries: tuple[str, ...]) -> None:
    op, parameters = "mark_trainable", dict(model.named_parameters())
    for entry in entries:
        named = [name for name in parameters if matches(entry, name)]
        if not named:
            rule = "name parameters of the model"
            _checks.reject(ValueError, op, "also", rule, repr(entry))
        codes = [name for name in named if not parameters[name].is_floating_point()]
        if codes:
            rule = "name parameters that can be trained"
            _checks.reject(ValueError, op, "also", rule, f"NF4 codes, {codes[0]!r}")


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters inside the block, e.g. as a reference for DPO.

    Raises:
        ValueError: if an adapter is merged.

    Example:
        >>> layer = LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8)
        >>> with disable_adapters(layer):
        ...     y = layer(torch.ones(64))
    """
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        if adapter.merged:
            _checks.reject(ValueError, "disable_adapters", name, "be unmerged", "merged")
    before = {name: adapter.enabled for name, adapter in adapters.items()}
    try:
        for adapter in adapters.values():
            adapter.enabled = False
        yield
    finally:
        for name, adapter in adapters.items():
            adapter.enabled = before[name]


def merge_adapters(
    model: nn.Module, into: str = "base", *, rule: str = "cpu"
) -> dict[str, MergeReport]:
    """Merge every adapter into its base, for good: the model has plain layers again.

    One layer at a time, so that beside the model only one dense weight exists. For a merge that can
    be taken back, call `merge` and `unmerge` of the adapters.

    Args:
        model: any module that contains adapters.
        into: "base" or "dense", as for `Adapter.merge`.
        rule: "cpu" or "cuda", whose rounding decisions the NF4 quantizer follows.

    Returns:
        For every layer the error that storing its merged weight has added.

    Raises:
        ValueError: if `model` is itself an adapter or has none (nothing has been changed then), or
            a layer cannot be merged, which the message names (those before it are merged then).

    Source:
        LoRA (arXiv 2106.09685), section 4.1.

    Example:
        >>> model = nn.Sequential(LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8))
        >>> merge_adapters(model)["0"].max_error
        0.0
        >>> type(model[0]).__name__
        'Linear'
    """
    op = "merge_adapters"
    places = [place for place in places_of(model) if isinstance(place.module, Adapter)]
    if isinstance(model, Adapter) or not places:
        got = type(model).__name__
        _checks.reject(ValueError, op, "model", "contain adapters (for one: its merge)", got)
    reports: dict[str, MergeReport] = {}
    made: dict[int, tuple[nn.Module, MergeReport]] = {}
    # The adapters stay alive until the end, so that no id stands for two.
    adapters = [place.module for place in places]
    for place, adapter in zip(places, adapters, strict=True):
        assert isinstance(adapter, Adapter)
        if id(adapter) not in made:
            try:
                report = adapter.merge(into, rule=rule)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{op}: {place.name}: {error}") from error
            made[id(adapter)] = (adapter.release(), report)
        base, reports[place.name] = made[id(adapter)]
        setattr(place.parent, place.attribute, base)
    return reports
