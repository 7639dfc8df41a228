"""to_universal: a ZeRO checkpoint with our states as DeepSpeed's universal one, for any world size.

```
   tag/zero_pp_rank_*_optim_states.pt  --codes to fp32-->  the same files, temporary
                                                             |  DeepSpeed's own ds_to_universal
   out/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt  <-+
```
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from feinwerk import _checks
from feinwerk.optim.group import LAYOUT_OPTIONS
from feinwerk.optim.moments import dequantize_moment
from feinwerk.optim.state import MOMENTS

_OP = "to_universal"
# Of stages 1 and 2, and of stage 3.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
# What DeepSpeed asks of a checkpoint is one since 0.3.17.
DS_VERSION = "0.19.8"


def to_universal(
    checkpoint_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tag: str | None = None,
    workers: int = 1,
) -> Path:
    """Convert a DeepSpeed checkpoint with our AdamW's states to a universal checkpoint.

    DeepSpeed resumes its checkpoints at the world size and stage that wrote them; this universal
    one, with `"checkpoint": {"load_universal": true}` in the configuration, at any:

        engine.load_checkpoint(out_dir.parent, tag=out_dir.name)

    Its moments are fp32. 8-bit states are dequantized for it, exactly, and AdamW quantizes them
    anew at its first step, over blocks that lie differently: the training goes on as after one more
    rounding, not bit for bit. States of 32 bits come through exactly. Stages 1, 2 and 3.

    The files are read as DeepSpeed reads them, by unpickling: convert only what you trust. The
    result appears under its name when it is complete.

    Args:
        checkpoint_dir: as given to `engine.save_checkpoint`.
        out_dir: the universal checkpoint to make; must not exist.
        tag: of the checkpoint; default what the file `latest` says.
        workers: processes that DeepSpeed's converter may use.

    Returns:
        The path of the universal checkpoint.

    Raises:
        FileNotFoundError: if there is no such checkpoint or no optimizer states in it.
        FileExistsError: if `out_dir` exists.
        ValueError: if a state is not one of AdamW's.
        ImportError: if DeepSpeed is not installed.

    Source:
        Universal Checkpointing (arXiv 2406.18820); deepspeed/checkpoint/ds_to_universal.py.
    """
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError as error:
        raise ImportError(f"{_OP} needs the package deepspeed") from error
    source, out = _checkpoint(Path(checkpoint_dir), tag), Path(out_dir)
    if out.exists():
        raise FileExistsError(f"{_OP}: out_dir must not exist, got {out}")
    files = sorted(source.glob("*_optim_states.pt"))
    if not files:
        raise FileNotFoundError(f"{_OP}: no *_optim_states.pt in {source}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result: the last rename must not cross file systems.
    work = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    converted, universal = work / "fp32", work / "universal"
    converted.mkdir(parents=True)
    try:
        counts = [_convert(file, converted / file.name) for file in files]
        lossy = any(quantized for quantized, _ in counts)
        _check_complete(source, files, max(partitions for _, partitions in counts))
        for file in source.iterdir():
            if file.is_file() and file not in files:
                (converted / file.name).symlink_to(file.resolve())
        arguments = argparse.Namespace(
            input_folder=str(converted), output_folder=str(universal), strict=True,
            num_extract_workers=workers, num_merge_workers=workers, keep_temp_folder=False,
            inject_missing_state=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
        _for_every_stage(converted / files[0].name, universal)
        universal.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_whole(out.parent / "latest_universal", out.name)
    if lossy:
        warnings.warn(
            f"{_OP}: the 8-bit moments are stored as fp32, dequantized; AdamW quantizes them anew "
            "when it resumes, which costs one more rounding",
            stacklevel=2,
        )
    return out


def _checkpoint(directory: Path, tag: str | None) -> Path:
    if tag is None:
        latest = directory / "latest"
        if not latest.is_file():
            raise FileNotFoundError(f"{_OP}: tag must be given without a file {latest}")
        tag = latest.read_text().strip()
    if not (directory / tag).is_dir():
        raise FileNotFoundError(f"{_OP}: no checkpoint {tag} in {directory}")
    return directory / tag


def _convert(source: Path, target: Path) -> tuple[bool, int]:
    """Write an optimizer shard with fp32 moments.

    Returns:
        Whether there were codes in it, and of how many shards it is one.
    """
    shard = torch.load(source, map_location="cpu", weights_only=False)
    quantized = False
    base = _base_state(shard)
    if not isinstance(base, dict):
        rule = "be saved with zero_optimization.elastic_checkpoint false"
        _checks.reject(ValueError, _OP, source.name, rule, "true")
    groups = {key: group for group in base["param_groups"] for key in group["params"]}
    for key, state in base["state"].items():
        codes = "exp_avg_codes" in state
        quantized |= codes
        base["state"][key] = _fp32_state(f"{source.name}, state {key}", state, groups[key])
    for group in base["param_groups"]:
        # How states are stored is the business of the optimizer that loads them.
        for name in LAYOUT_OPTIONS:
            group.pop(name, None)
    torch.save(shard, target)
    counts = shard["optimizer_state_dict"].get("partition_count", 1)
    return quantized, max(counts) if isinstance(counts, list) else int(counts)


def _check_complete(source: Path, files: list[Path], partitions: int) -> None:
    """Refuse a checkpoint without all its shards, which DeepSpeed's converter would merge."""
    ranks: dict[str, set[int]] = {}
    for file in files:
        match = re.search(r"zero_pp_rank_(\d+)_mp_rank_(\d+)", file.name)
        if match:
            ranks.setdefault(match[2], set()).add(int(match[1]))
    for model_rank, found in sorted(ranks.items()):
        missing = sorted(set(range(partitions)) - found)
        if missing:
            raise FileNotFoundError(
                f"{_OP}: {source} lacks the optimizer states of ranks {missing} of {partitions} "
                f"(mp_rank {model_rank})"
            )


def _base_state(shard: dict[str, Any]) -> Any:
    """Return the optimizer's own state dict, in stages 1 and 2 or in stage 3."""
    zero = shard["optimizer_state_dict"]
    return zero[
        "base_optimizer_state" if "base_optimizer_state" in zero else "optimizer_state_dict"
    ]


def _fp32_state(where: str, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    quantized = {f"{name}_{part}" for name in MOMENTS for part in ("codes", "absmax")}
    if set(state) == {"step", *MOMENTS}:
        return {**state, **{name: state[name].float() for name in MOMENTS}}
    if set(state) != {"step", *quantized}:
        rule = "be one of AdamW's: a step and two moments, in fp32, bf16 or 8 bits"
        _checks.reject(ValueError, _OP, where, rule, ", ".join(map(str, state)) or "nothing")
    fp32 = {"step": state["step"]}
    for name in MOMENTS:
        fp32[name] = dequantize_moment(
            name, state[f"{name}_codes"], state[f"{name}_absmax"], group["blocksize"]
        )
    return fp32


def _for_every_stage(shard_file: Path, universal: Path) -> None:
    """Complete what DeepSpeed's converter writes for the stage of its source only."""
    zero = universal / "zero"
    states = _base_state(torch.load(shard_file, map_location="cpu", weights_only=False))["state"]
    step = next(iter(states.values()))["step"] if states else torch.tensor(0.0)
    # In stage 3 this file holds all states of rank 0, and every rank would read it.
    common = torch.load(zero / "optimizer_state.pt", map_location="cpu", weights_only=False)
    common.pop("fp32_flat_groups", None)
    groups = common["param_groups"]
    common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    common.setdefault("ds_version", DS_VERSION)
    torch.save(common, zero / "optimizer_state.pt")

    files = sorted(universal.glob("*_model_states.pt"))
    model = torch.load(files[0], map_location="cpu", weights_only=False)
    shapes = _shapes_of(model)
    for folder in sorted(path for path in zero.iterdir() if path.is_dir()):
        if not (folder / "exp_avg.pt").exists():
            continue
        if not (folder / "step.pt").exists():
            torch.save(step, folder / "step.pt")
        for name in ("fp32", *MOMENTS):
            stored = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=False)
            if isinstance(stored, torch.Tensor):
                whole = {"param": stored.view(shapes[folder.name]), "cat_dim": 0}
                torch.save(whole, folder / f"{name}.pt")
    for name in MODEL_FILES if {_mp_rank(file) for file in files} == {"00"} else ():
        if not (universal / name).exists():
            # The engine takes counters from it; the weights come from zero/.
            torch.save({**model, "module": None}, universal / name)


def _shapes_of(model: dict[str, Any]) -> dict[str, torch.Size]:
    shapes = model.get("param_shapes") or {}
    return {name: shape for group in shapes for name, shape in group.items()}


def _mp_rank(file: Path) -> str:
    return file.name.partition("mp_rank_")[2][:2]


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_text(text)
    temporary.replace(path)
