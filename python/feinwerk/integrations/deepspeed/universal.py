"""Universal checkpoint folders of DeepSpeed from and into our optimizers, without DeepSpeed.

```
   folder/zero/<parameter>/fp32.pt  exp_avg.pt  exp_avg_sq.pt  step.pt     whole tensors, fp32
   folder/zero/optimizer_state.pt                                          options of the groups
   folder/mp_rank_00_model_states.pt, zero_pp_rank_0_...                   counters for the engine
```
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.distributed.checkpoint.agreement import ARGUMENTS, Peers
from feinwerk.distributed.checkpoint.names import canonical, optimizer_parameters
from feinwerk.distributed.errors import CheckpointError, MismatchedCheckpoint
from feinwerk.integrations.deepspeed.convert import DS_VERSION, MODEL_FILES, write_whole
from feinwerk.optim import AdamW
from feinwerk.optim.group import LAYOUT_OPTIONS
from feinwerk.optim.master import join_master, split_master
from feinwerk.optim.moments import dequantize_moment, quantize_moment
from feinwerk.optim.state import MOMENTS, is_dtensor, to_local


def export_universal(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | os.PathLike[str],
    *,
    global_steps: int | None = None,
    timeout: float = 600.0,
) -> Path:
    """Write parameters and moments as a universal checkpoint that DeepSpeed resumes from.

    DeepSpeed loads it at any stage (1, 2, 3) and world size, with `"checkpoint": {"load_universal":
    true}` in its configuration and the same parameter groups:

        engine.load_checkpoint(folder.parent, tag=folder.name, load_lr_scheduler_states=False)

    8-bit moments are dequantized, exactly; a bf16 parameter is written as its fp32 master. Tensors
    are gathered and written one by one. Every rank of the default group calls this; the folder is
    the same for all and appears when it is complete.

    Args:
        model: bare or wrapped; under FSDP2 or with `ShardedAdamW` as well.
        optimizer: `feinwerk.optim.AdamW`, `ShardedAdamW` or `torch.optim.AdamW`.
        folder: to make; must not exist.
        global_steps: the engine's counter; default the steps that the first parameter took.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Returns:
        The path of the folder.

    Raises:
        CheckpointError: on every rank, if one of them failed, or a state is not one of AdamW's.

    Example:
        >>> import tempfile
        >>> from feinwerk.optim import AdamW
        >>> model = nn.Linear(4, 2)
        >>> optimizer = AdamW(model.parameters())
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> folder = export_universal(model, optimizer, Path(tempfile.mkdtemp()) / "universal")
        >>> sorted(path.name for path in (folder / "zero").iterdir())
        ['bias', 'optimizer_state.pt', 'weight']
    """
    op = "export_universal"
    peers = Peers(op, None, timeout)
    final = Path(folder).absolute()
    members = [
        (name, parameter, group)
        for named, group in zip(
            optimizer_parameters(op, model, optimizer), optimizer.param_groups, strict=True
        )
        for name, parameter in named
    ]
    work = Path(peers.first("create", lambda: str(_create(op, final))))
    try:
        steps = peers.together("write", lambda: _write(op, work, members, optimizer, peers))[0]

        def finish() -> None:
            _write_counters(work, optimizer, steps, global_steps)
            work.rename(final)
            write_whole(final.parent / "latest_universal", final.name)

        peers.first("finish", finish)
    except BaseException:
        if peers.is_first:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def import_universal(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    timeout: float = 600.0,
) -> int:
    """Load parameters and moments of a universal checkpoint, DeepSpeed's or `export_universal`'s.

    Moments are quantized as the optimizer keeps them; a bf16 parameter gets the fp32 master's
    remainder too. Each rank cuts its own rows out of the files; nothing is communicated but the
    outcome. The options of the optimizer's groups (lr, betas, ...) stay as they are. Parameters of
    the model that the optimizer does not have are loaded if the folder has them. Nothing is
    unpickled. A DeepSpeed checkpoint that is not universal goes through `to_universal` first;
    `feinwerk.distributed.save_checkpoint` then saves what was loaded.

    Args:
        folder: the universal checkpoint, with its folder `zero`.
        model: bare or wrapped; under FSDP2 or with `ShardedAdamW` as well.
        optimizer: `feinwerk.optim.AdamW`, `ShardedAdamW` or `torch.optim.AdamW`.
        steps: taken by every parameter; only for a folder that DeepSpeed's converter made of a
            stage 3 checkpoint: it has no step.pt.
        timeout: seconds that the slowest rank may keep the others waiting in one phase.

    Returns:
        How many steps the first parameter with moments has taken; 0 if there are none.

    Raises:
        MismatchedCheckpoint: if it is one of another model: with every name and shape. Nothing has
            been changed then.
        CheckpointError: on every rank, if a file cannot be read.
    """
    op = "import_universal"
    peers = Peers(op, None, timeout)
    zero = Path(folder).absolute() / "zero"
    matched: list[dict[str, torch.Tensor]] = []
    peers.together(ARGUMENTS, lambda: matched.append(_match(op, zero, model, optimizer, steps)))
    groups = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }

    def read() -> int:
        taken = 0
        for name, parameter in matched[0].items():
            state = _read(zero / name, parameter, groups.get(id(parameter)), optimizer, steps)
            optimizer.state.pop(parameter, None)
            if state is not None:
                optimizer.state[parameter] = state
                taken = taken or int(state["step"])
        return taken

    try:
        return peers.together("reading", read)[0]
    except CheckpointError as error:
        error.partly_loaded = True
        raise


def _create(op: str, final: Path) -> Path:
    if final.exists():
        raise FileExistsError(f"{op}: folder must not exist, got {final}")
    work = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    (work / "zero").mkdir(parents=True)
    return work


def _write(
    op: str,
    work: Path,
    members: list[tuple[str, torch.Tensor, dict[str, Any]]],
    optimizer: torch.optim.Optimizer,
    peers: Peers,
) -> int:
    """Gather tensor by tensor; rank 0 writes. Return the steps of the first parameter."""
    steps, failure = 0, None
    for name, parameter, group in members:
        state = {key: _whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
        entries = {"fp32": _master(_whole(parameter.detach()), state)}
        for moment in MOMENTS if state else ():
            entries[moment] = _fp32_moment(op, name, moment, state, group)
        if state:
            steps = steps or int(state["step"])
        if not peers.is_first or failure:
            continue
        try:
            target = work / "zero" / name
            target.mkdir()
            for key, tensor in entries.items():
                torch.save({"param": tensor.cpu(), "cat_dim": 0}, target / f"{key}.pt")
            if state:
                torch.save(torch.tensor(float(state["step"])), target / "step.pt")
        except OSError as error:
            failure = error  # the others go on to gather: they must not be left waiting
    if failure:
        raise failure
    return steps


def _whole(value: Any) -> Any:
    """Gather a DTensor: a collective call."""
    return value.full_tensor() if is_dtensor(value) else value


def _master(parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if "param_remainder" in state:
        return join_master(parameter, state["param_remainder"])
    return parameter.float().contiguous()


def _fp32_moment(
    op: str, name: str, moment: str, state: dict[str, Any], group: dict[str, Any]
) -> torch.Tensor:
    if f"{moment}_codes" in state:
        codes, absmax = state[f"{moment}_codes"], state[f"{moment}_absmax"]
        return dequantize_moment(moment, codes, absmax, group["blocksize"])
    if moment not in state or "step" not in state:
        rule = "be one of AdamW's: a step and two moments"
        _checks.reject(ValueError, op, f"state of {name}", rule, ", ".join(map(str, state)))
    fp32: torch.Tensor = state[moment].float().contiguous()
    return fp32


def _write_counters(
    work: Path, optimizer: torch.optim.Optimizer, steps: int, global_steps: int | None
) -> None:
    """Write what the engine reads beside the tensors, for stages 1 and 2 and for stage 3."""
    groups = [
        {
            key: value
            for key, value in group.items()
            if key not in (*LAYOUT_OPTIONS, "params", "param_names")
        }
        for group in optimizer.param_groups
    ]
    base = {"state": {0: {"step": torch.tensor(float(steps))}}, "param_groups": groups}
    torch.save(
        {"ds_version": DS_VERSION, "param_groups": groups, "optimizer_state_dict": base},
        work / "zero" / "optimizer_state.pt",
    )
    counters = {
        "module": None,
        "global_steps": steps if global_steps is None else global_steps,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": None,
    }
    for name in MODEL_FILES:
        torch.save(counters, work / name)


def _match(
    op: str, zero: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int | None
) -> dict[str, torch.Tensor]:
    """Return the parameters that the folder has, by name; nothing is changed."""
    if not zero.is_dir():
        raise CheckpointError(f"{op}: no universal checkpoint in {zero.parent}: it has no zero/")
    parameters = {canonical(model, name): p for name, p in model.named_parameters()}
    needed = {name for named in optimizer_parameters(op, model, optimizer) for name, _ in named}
    stored = {path.parent.relative_to(zero).as_posix() for path in zero.glob("*/fp32.pt")}
    different = [
        f"{name} has shape {list(shape)} in the checkpoint and {list(parameters[name].shape)} here"
        for name in sorted(stored & set(parameters))
        if (shape := _load(zero / name / "fp32.pt").shape) != parameters[name].shape
        # Stage 3 keeps no shapes.
        and tuple(shape) != (parameters[name].numel(),)
    ]
    missing, unexpected = sorted(needed - stored), sorted(stored - set(parameters))
    if missing or unexpected or different:
        raise MismatchedCheckpoint(str(zero.parent), missing, unexpected, different)
    for name in sorted(stored & needed):
        if (zero / name / "exp_avg.pt").exists():
            _step(zero / name, steps)
    return {name: parameter for name, parameter in parameters.items() if name in stored}


def _load(file: Path) -> torch.Tensor:
    """Map a file of the folder into memory: a tensor, or one in a dict with how it was joined."""
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    tensor = content["param"] if isinstance(content, dict) else content
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{file} holds no tensor but {type(tensor).__name__}")
    return tensor


def _read(
    folder: Path,
    parameter: torch.Tensor,
    group: dict[str, Any] | None,
    optimizer: torch.optim.Optimizer,
    steps: int | None,
) -> dict[str, torch.Tensor] | None:
    """Fill a parameter; return its state, or None if there is nothing to keep."""
    fp32 = _load(folder / "fp32.pt")
    master = _own_part(fp32, parameter)
    state = None if group is None else _new_state(parameter, group, optimizer)
    remainders = state is not None and "param_remainder" in state
    with torch.no_grad():
        to_local(parameter).copy_(split_master(master)[0] if remainders else master)
    if state is None or group is None:
        return None
    # With ShardedAdamW the states are sharded and the parameter is not.
    like = state["exp_avg_codes" if "exp_avg_codes" in state else "exp_avg"]
    if remainders:
        to_local(state["param_remainder"]).copy_(split_master(_own_part(fp32, like))[1])
    if not (folder / "exp_avg.pt").exists():
        return state if "param_remainder" in state else None  # of a parameter without a step
    state["step"] = torch.tensor(_step(folder, steps))
    for moment in MOMENTS:
        values = _own_part(_load(folder / f"{moment}.pt"), like)
        if f"{moment}_codes" in state:
            codes, absmax = quantize_moment(moment, values, group["blocksize"])
            to_local(state[f"{moment}_codes"]).copy_(codes)
            to_local(state[f"{moment}_absmax"]).copy_(absmax)
        else:
            to_local(state[moment]).copy_(values)
    return state


def _own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cut out what this rank holds of a tensor that every rank has."""
    whole = whole.float().view(like.shape).to(like.device)
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _step(folder: Path, steps: int | None) -> float:
    file = folder / "step.pt"
    if file.exists():
        return float(torch.load(file, map_location="cpu", weights_only=True))
    if steps is None:
        raise CheckpointError(f"{folder} has no step.pt (to_universal writes it): pass steps=")
    return float(steps)


def _new_state(
    parameter: torch.Tensor, group: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Allocate what the first step would."""
    if isinstance(optimizer, AdamW):
        return optimizer.empty_state(parameter, group)
    moments = {moment: torch.zeros_like(parameter).detach() for moment in MOMENTS}
    return {"step": torch.tensor(0.0), **moments}  # torch.optim.AdamW
