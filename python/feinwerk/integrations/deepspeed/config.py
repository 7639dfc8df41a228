"""What a DeepSpeed configuration must say, and must not say, with our AdamW as client optimizer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

_OP = "deepspeed config"


def complete_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Return a copy of a DeepSpeed configuration that accepts our AdamW as client optimizer.

    Sets `zero_allow_untested_optimizer: true`, and `zero_force_ds_cpu_optimizer: false` if the
    optimizer is offloaded. Nothing else is changed.

    Args:
        config: as given to `deepspeed.initialize`: a dict, or the path of a JSON file.

    Returns:
        The configuration for `deepspeed.initialize`.

    Raises:
        ValueError: as `check_config` does, for what cannot be completed.

    Example:
        >>> complete_config({"zero_optimization": {"stage": 2}})["zero_allow_untested_optimizer"]
        True
    """
    completed = _as_dict(config)
    completed["zero_allow_untested_optimizer"] = True
    if _device(completed, "offload_optimizer") != "none":
        completed["zero_force_ds_cpu_optimizer"] = False
    check_config(completed)
    return completed


def check_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Refuse a DeepSpeed configuration with which our AdamW does not work, naming every entry.

    Args:
        config: as given to `deepspeed.initialize`: a dict, or the path of a JSON file.

    Raises:
        ValueError: if an entry is missing or in the way.

    Example:
        >>> check_config({"zero_optimization": {"stage": 1}})
        Traceback (most recent call last):
        ValueError: deepspeed config: zero_allow_untested_optimizer must be true, got nothing
    """
    config = _as_dict(config)
    problems = _missing(config) + _in_the_way(config)
    if problems:
        raise ValueError("; ".join(f"{_OP}: {problem}" for problem in problems))


def _missing(config: dict[str, Any]) -> list[str]:
    problems = []
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 0 and config.get("zero_allow_untested_optimizer") is not True:
        got = _shown(config, "zero_allow_untested_optimizer")
        problems.append(f"zero_allow_untested_optimizer must be true, got {got}")
    device = _device(config, "offload_optimizer")
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True) is not False:
        got = _shown(config, "zero_force_ds_cpu_optimizer")
        problems.append(
            f"zero_force_ds_cpu_optimizer must be false with offload_optimizer, got {got}"
        )
    return problems


def _in_the_way(config: dict[str, Any]) -> list[str]:
    zero = config.get("zero_optimization", {})
    problems = []
    if _device(config, "offload_optimizer") == "nvme":
        # Its swapper moves one dtype, the partition's, and buffers of the partition's length.
        rule = "be cpu or none (DeepSpeed swaps fp32 states only)"
        problems.append(f"zero_optimization.offload_optimizer.device must {rule}, got nvme")
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1.0:
        rule = "be 1.0 (the rest would be stepped by another optimizer)"
        problems.append(f"zero_optimization.offload_optimizer.ratio must {rule}, got {ratio}")
    if zero.get("elastic_checkpoint"):
        # It cuts the padding of the partition off every state, absmax included.
        rule = "be false (it would cut the states as if each were fp32)"
        problems.append(f"zero_optimization.elastic_checkpoint must {rule}, got true")
    if zero.get("zenflow"):
        rule = "be left out (it steps the partitions with an optimizer of its own)"
        problems.append(f"zero_optimization.zenflow must {rule}, got {zero['zenflow']}")
    return problems


def _as_dict(config: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    with open(config, encoding="utf-8") as file:
        loaded: dict[str, Any] = json.load(file)
    return loaded


def _device(config: dict[str, Any], section: str) -> str:
    entry = config.get("zero_optimization", {}).get(section) or {}
    return str(entry.get("device", "none"))


def _shown(config: dict[str, Any], name: str) -> str:
    return json.dumps(config[name]) if name in config else "nothing"
