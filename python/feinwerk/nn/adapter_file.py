"""save_adapter and load_adapter: a model's adapters in PEFT's own files, both ways.

```
   adapter_model.safetensors                                      ours
   base_model.model.<path>.lora_A.weight                          <path>.lora_A       linear, conv
   base_model.model.<path>.lora_B.weight                          <path>.lora_B
   base_model.model.<path>.lora_B.bias                            <path>.lora_bias
   base_model.model.<path>.lora_magnitude_vector                  <path>.magnitude
   base_model.model.<path>.lora_embedding_A, .lora_embedding_B    <path>.lora_A, .lora_B
   adapter_config.json: r, lora_alpha, use_dora, ..., as PEFT 0.21 writes it
```
PEFT holds a convolution's magnitude as [1, N, 1, 1], and saves the table of an adapted embedding of
a transformers model as `<path>.base_layer.weight`. safetensors is imported where it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import nf4_rows
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.add_adapters import adapter_class, adapters_of, wrap
from feinwerk.nn.dora import DoRA
from feinwerk.nn.lora import is_conv1d
from feinwerk.nn.lora_conv import LoRAConv
from feinwerk.nn.lora_embedding import LoRAEmbedding
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.nn.places import places_of

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"

_SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "base_layer.weight": "weight",
}

# PEFT's options that change what an adapter computes or which files it needs, and that have no
# counterpart here: the value that means "not used".
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# PEFT runs the init again when it loads. These leave the base as it is, or can be repeated exactly.
_INITS: dict[Any, str] = {
    True: "default", False: "default", "gaussian": "default", "orthogonal": "default",
    "eva": "default", "mica": "default", "pissa": "pissa", "olora": "olora",
}  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, *, relative_to: str = "original") -> None:
    """Write the adapters of a model as PEFT does: `PeftModel.from_pretrained(base, folder)` reads.

    An init that took A and B out of the base ("pissa", "olora", "loftq") has changed the base. By
    default the file is for the base as it was before: it holds the difference s (B A - B0 A0), of
    rank 2 r, which is exact for a dense base.

    Under fully_shard all ranks call this: the adapters are gathered, and rank 0 writes.

    Args:
        model: any module that contains adapters, unmerged.
        folder: where to write adapter_config.json and adapter_model.safetensors; made if missing.
        relative_to: "original", or "current": A and B as they are, for the base as it is; save
            that with them.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the model has no adapter or one is merged, LoRA and DoRA are mixed (or
            adapters with and without use_rslora or lora_bias), or an NF4 base has been changed by
            the init and relative_to is "original": its new codes are no low-rank change. Nothing
            is written.

    Source:
        PEFT 0.21, its checkpoint format.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     load_adapter(model, folder)
        ['0']
    """
    from safetensors.torch import save_file

    op = "save_adapter"
    if relative_to not in ("original", "current"):
        rule = 'be "original" or "current"'
        _checks.reject(ValueError, op, "relative_to", rule, repr(relative_to))
    adapters = adapters_of(model)
    if not adapters or "" in adapters:
        got = type(model).__name__
        _checks.reject(ValueError, op, "model", "contain adapters", got)
    kinds = {
        (isinstance(a, DoRA), a.use_rslora, a.lora_bias is not None) for a in adapters.values()
    }
    if len(kinds) > 1:
        rule = "be alike in DoRA, use_rslora and lora_bias: PEFT's config has one value for all"
        _checks.reject(ValueError, op, "adapters", rule, f"{len(kinds)} kinds")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for name, adapter in adapters.items():
        if adapter.merged:
            _checks.reject(ValueError, op, name, "be unmerged", "merged")
        A, B = _factors(op, name, adapter, relative_to)
        # lora_alpha so that PEFT's alpha / r (or alpha / sqrt r) is the scaling in use.
        root = math.sqrt(len(A)) if adapter.use_rslora else len(A)
        ranks[name] = (len(A), float(adapter.scaling) * root)
        for key, value in _entries(adapter, A, B).items():
            tensors[f"{_PREFIX}{name}.{key}"] = nf4_rows.whole(value).cpu().contiguous()
    if any(map(nf4_rows.is_managed, adapters.values())) and torch.distributed.get_rank():
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = _config(model, adapters, ranks)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Read adapters that PEFT or `save_adapter` wrote.

    Layers without an adapter get one, as the files say, and the model's other parameters are
    frozen; adapters that are there already are overwritten, and must be of the same rank and kind.

    Args:
        model: the base model the adapter was trained on, or one that has adapters.
        folder: with adapter_config.json and adapter_model.safetensors.
        dtype: of the parameters of new adapters.

    Returns:
        The names of the adapted layers.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the config has an option that cannot be honoured, or a tensor does not fit
            the model; the message names it. Nothing has been changed then.

    Source:
        PEFT 0.21, its checkpoint format.

    Example:
        See `save_adapter`.
    """
    op = "load_adapter"
    config, init, found, options = read_files(op, folder)
    there = adapters_of(model)
    free = {place.name: place for place in places_of(model) if adapter_class(place.module)}
    for name, parts in found.items():
        if name not in there and name not in free:
            rule = "name a layer of the model that can have an adapter"
            _checks.reject(ValueError, op, "key", rule, repr(name))
        layer = there[name] if name in there else free[name].module
        _check_fit(op, name, layer, options[name], parts, init, dora=bool(config.get("use_dora")))
    missing = [free[name] for name in found if name not in there]
    if missing:
        wrap(
            model, missing, dora=bool(config.get("use_dora")), trainable=(), op=op,
            options_of=lambda place: {
                **options[place.name], "dtype": dtype,
                "init": "default" if isinstance(place.module, nn.Embedding) else init,
            },
        )  # fmt: skip
    adapters = adapters_of(model)
    with torch.no_grad():
        for name, parts in found.items():
            adapter = adapters[name]
            for key, value in parts.items():
                nf4_rows.put(getattr(adapter, key), value)
            adapter.set_scaling(options[name]["lora_alpha"], options[name]["use_rslora"])
            adapter.invalidate()
    return list(found)


def read_files(
    op: str, folder: str | Path
) -> tuple[dict[str, Any], str, dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """Return the config, the init the base needs, every layer's tensors and its options."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / _CONFIG).read_text())
    init = _check_config(op, config)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(Path(folder) / _WEIGHTS).items():
        path, name = _split(op, key)
        found.setdefault(path, {})[name] = value
    options = {name: _options(op, config, name, parts) for name, parts in found.items()}
    return config, init, found, options


def _factors(
    op: str, name: str, adapter: Adapter, relative_to: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for the base that the file is for."""
    A, B = nf4_rows.whole(adapter.lora_A), nf4_rows.whole(adapter.lora_B)
    if adapter.initial_A is None or adapter.initial_B is None or relative_to == "current":
        return A, B
    if isinstance(adapter.base_layer, NF4Module):
        rule = "have a dense base: the init has changed its NF4 codes (save the base as well, and "
        rule += 'the adapter with relative_to="current")'
        _checks.reject(ValueError, op, name, rule, f"init={adapter.init!r}")
    return torch.cat([A, adapter.initial_A]), torch.cat([B, -adapter.initial_B], dim=1)


def _entries(adapter: Adapter, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(adapter, LoRAEmbedding):
        entries = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        entries = {"lora_A.weight": A, "lora_B.weight": B}
    if adapter.lora_bias is not None:
        entries["lora_B.bias"] = adapter.lora_bias
    if isinstance(adapter, DoRA):
        magnitude = nf4_rows.whole(adapter.magnitude)
        if isinstance(adapter, LoRAConv):
            magnitude = magnitude.view(1, -1, *(1,) * (adapter.lora_A.dim() - 2))
        entries["lora_magnitude_vector"] = magnitude
    return entries


def _config(
    model: nn.Module, adapters: dict[str, Adapter], ranks: dict[str, tuple[int, float]]
) -> dict[str, Any]:
    """PEFT's config: the most common rank and alpha, and patterns for the layers that differ."""
    (r, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    others = {name for name, _ in model.named_modules() if name not in adapters}
    ambiguous = any(other.endswith(f".{name}") for name in adapters for other in others)
    names = "|".join(re.escape(name) for name in adapters)
    values = adapters.values()
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": v[0] for n, v in ranks.items() if v[0] != r},
        "alpha_pattern": {f"^{re.escape(n)}": v[1] for n, v in ranks.items() if v[1] != alpha},
        # PEFT takes the names of a list for the ends of names, too.
        "target_modules": names if ambiguous else list(adapters),
        "lora_dropout": max(adapter.dropout for adapter in values),
        "lora_bias": any(adapter.lora_bias is not None for adapter in values),
        "use_dora": any(isinstance(adapter, DoRA) for adapter in values),
        "use_rslora": any(adapter.use_rslora for adapter in values),
        "fan_in_fan_out": any(is_conv1d(adapter.base_layer) for adapter in values),
        "bias": "none",
        "init_lora_weights": True,
    }


def _check_config(op: str, config: dict[str, Any]) -> str:
    """Reject what cannot be honoured; return the init that the base needs."""
    if config.get("peft_type") != "LORA":
        _checks.reject(ValueError, op, "peft_type", "be 'LORA'", repr(config.get("peft_type")))
    for option, unused in _REFUSED.items():
        value = config.get(option)
        if option in config and value not in unused:
            rule = f"be {unused[0]!r}: it cannot be honoured here"
            _checks.reject(ValueError, op, option, rule, repr(value))
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        rule = "be one that leaves the base as it is or can be repeated exactly"
        _checks.reject(ValueError, op, "init_lora_weights", rule, repr(init))
    return _INITS[init]


def _split(op: str, key: str) -> tuple[str, str]:
    """The layer's path and our name of the parameter."""
    for suffix, name in _SUFFIXES.items():
        if key.startswith(_PREFIX) and key.endswith(f".{suffix}"):
            return key[len(_PREFIX) : -len(suffix) - 1], name
    _checks.reject(ValueError, op, "key", "be one that PEFT writes for LoRA or DoRA", repr(key))


def _pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the name, as PEFT takes it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _options(
    op: str, config: dict[str, Any], name: str, parts: dict[str, torch.Tensor]
) -> dict[str, Any]:
    r = _pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    needed = {"lora_A", "lora_B"} | ({"magnitude"} if config.get("use_dora") else set())
    if not needed <= parts.keys():
        lacking = ", ".join(sorted(needed - parts.keys()))
        _checks.reject(ValueError, op, name, f"have its {lacking} in the file", sorted(parts))
    if "magnitude" in parts and not config.get("use_dora"):
        _checks.reject(ValueError, op, name, "have no magnitude without use_dora", sorted(parts))
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": bool(config.get("use_rslora")),
        "dropout": config.get("lora_dropout") or 0.0,
        "lora_bias": "lora_bias" in parts,
    }


def _check_fit(
    op: str,
    name: str,
    layer: nn.Module,
    options: dict[str, Any],
    parts: dict[str, torch.Tensor],
    init: str,
    *,
    dora: bool,
) -> None:
    """Compare kind and shapes with an adapter that is there, or with one that will be made."""
    r: int = options["r"]
    if isinstance(layer, Adapter):
        kind: type[Adapter] | None = type(layer)
        if layer.merged:
            _checks.reject(ValueError, op, name, "be unmerged", "merged")
        if isinstance(layer, DoRA) != dora:
            what = "DoRA" if dora else "LoRA"
            _checks.reject(ValueError, op, name, f"be {what} as in the file", type(layer).__name__)
        if layer.r != r or (layer.lora_bias is not None) != options["lora_bias"]:
            rule = f"have r={r} and lora_bias={options['lora_bias']} as in the file"
            got = f"r={layer.r} and lora_bias={layer.lora_bias is not None}"
            _checks.reject(ValueError, op, name, rule, got)
        if init != "default" and layer.init != init and not isinstance(layer, LoRAEmbedding):
            rule = f"have init={init!r} as in the file: its base has changed"
            _checks.reject(ValueError, op, name, rule, repr(layer.init))
        layer = layer.base_layer
    else:
        kind = adapter_class(layer, dora=dora)
    assert kind is not None
    shape_A, shape_B = kind.shapes(layer, r)
    if "weight" in parts and isinstance(layer, NF4Module):
        rule = "be absent from the file for an NF4 base, which the adapter was not trained on"
        _checks.reject(ValueError, op, f"{name}.base_layer.weight", rule, type(layer).__name__)
    weight = layer._parameters["weight"]
    assert weight is not None
    expected = {
        "lora_A": shape_A,
        "lora_B": shape_B,
        "lora_bias": shape_B[:1],
        "weight": tuple(weight.shape),
    }
    for key, value in parts.items():
        size = tuple(value.shape)
        if key == "magnitude":
            shape, fits = shape_B[:1], value.numel() == shape_B[0]
        else:
            shape, fits = expected[key], size == expected[key]
        if not fits:
            _checks.reject(ValueError, op, f"{name}.{key}", f"have shape {shape}", size)
