"""What AdamW keeps for a parameter, how row shards of it become DTensors, and the step over a list.

```
   parameter [rows, ...]          exp_avg_codes          exp_avg_absmax       cut between two ranks
   ┌────────────────────┐         ┌────────────────┐     ┌───┬───┬───┐
   │ row 0              │         │ uint8, shape   │     │ ceil(row  │
   ├────────────────────┤  ---->  ├ of the         ┤ --- ├ / blocks- ┤ ---  any row: a block never
   │ row 1              │         │ parameter      │     │ ize)      │      crosses one
   └────────────────────┘         └────────────────┘     └───┴───┴───┘
```
So both are sharded on dimension 0 exactly as the parameter is, and any other cut has the same bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from feinwerk import _checks
from feinwerk.ops.adamw_step import adamw_step

MOMENTS = ("exp_avg", "exp_avg_sq")
# The code of zero in the signed dynamic map; in the unsigned one it is 0.
INITIAL_VALUES = {"exp_avg_codes": 127}

State = dict[str, torch.Tensor]
Shape = Sequence[int]
Group = Mapping[str, Any]


class StepItem(NamedTuple):
    """One parameter of a step: local tensors, and what addresses its random words."""

    param: torch.Tensor
    grad: torch.Tensor
    state: State
    parameter_id: int
    first_element: int


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor is not imported to find out."""
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor that this rank holds; any other tensor is returned as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_quantized(global_shape: Shape, group: Group) -> bool:
    """Whether the moments of a parameter are 8-bit codes; the shape of the whole decides.

    Args:
        global_shape: of the unsharded parameter.
        group: a parameter group: `state_bits`, `layout`, `min_quantized_numel`.

    Example:
        >>> group = {"state_bits": 8, "layout": "rows", "min_quantized_numel": 4096}
        >>> is_quantized((64, 64), group), is_quantized((4096,), group)
        (True, False)
    """
    if group["state_bits"] != 8:
        return False
    if group["layout"] == "flat":
        return True
    return len(global_shape) >= 2 and math.prod(global_shape) >= group["min_quantized_numel"]


def global_shape_of_state(name: str, param_shape: Shape, group: Group) -> tuple[int, ...]:
    """Return the unsharded shape of one tensor of a state.

    Args:
        name: its key, such as "exp_avg_absmax".
        param_shape: of the unsharded parameter.
        group: a parameter group: `blocksize`.

    Example:
        >>> global_shape_of_state("exp_avg_absmax", (7, 500), {"blocksize": 256})
        (7, 2)
    """
    if name == "step":
        return ()
    if name.endswith("_absmax"):
        rows, row = _checks.rows_of(param_shape)
        return rows, -(-row // group["blocksize"])
    if name == "param_remainder":
        # The two bytes of an int16, low byte first: neither gloo nor NCCL can send int16.
        return *param_shape, 2
    return tuple(param_shape)


def state_dtypes(global_shape: Shape, dtype: torch.dtype, group: Group) -> dict[str, torch.dtype]:
    """Return the names and dtypes of a parameter's state.

    Args:
        global_shape: of the unsharded parameter.
        dtype: of the parameter.
        group: a parameter group: `state_bits`, `layout`, `min_quantized_numel`, `bf16_params`.

    Example:
        >>> group = {"state_bits": 32, "bf16_params": "remainder"}
        >>> list(state_dtypes((4,), torch.bfloat16, group))
        ['step', 'exp_avg', 'exp_avg_sq', 'param_remainder']
    """
    dtypes = {"step": torch.float32}
    quantized = is_quantized(global_shape, group)
    for name in MOMENTS:
        if quantized:
            dtypes[f"{name}_codes"] = torch.uint8
            dtypes[f"{name}_absmax"] = torch.float32
        else:
            dtypes[name] = torch.bfloat16 if group["state_bits"] == 16 else torch.float32
    if dtype is torch.bfloat16 and group["bf16_params"] == "remainder":
        dtypes["param_remainder"] = torch.uint8
    return dtypes


def new_state(local: torch.Tensor, global_shape: Shape, group: Group) -> State:
    """Return the state before the first step of one row shard: plain tensors on its device.

    Args:
        local: fp32 or bf16, the rows that this rank holds, possibly none; or the whole parameter.
        global_shape: of the unsharded parameter, which decides what is quantized.
        group: a parameter group: `state_bits`, `layout`, `min_quantized_numel`, `blocksize`,
            `bf16_params`.

    Returns:
        `step`, a 0-dim fp32 tensor on the CPU, and the rest by `state_dtypes`.

    Example:
        >>> group = {"state_bits": 8, "layout": "flat", "blocksize": 256}
        >>> new_state(torch.ones(500), (500,), group)["exp_avg_sq_absmax"]
        tensor([[0., 0.]])
    """
    state: State = {}
    for name, dtype in state_dtypes(global_shape, local.dtype, group).items():
        device = "cpu" if name == "step" else local.device
        shape = global_shape_of_state(name, local.shape, group)
        if name.endswith("_absmax") and len(global_shape) >= 2:
            # An empty shard may have lost the length of its rows.
            shape = (local.shape[0], global_shape_of_state(name, global_shape, group)[1])
        state[name] = torch.full(shape, INITIAL_VALUES.get(name, 0), dtype=dtype, device=device)
    return state


def wrap_state(state: State, mesh: Any, placements: Sequence[Any], global_shape: Shape) -> State:
    """Return the local tensors of a state as DTensors over a mesh; `step` stays as it is.

    Args:
        state: as from `new_state`, of this rank's shard.
        mesh: a DeviceMesh.
        placements: of the parameter; Shard(0) and Replicate for quantized states.
        global_shape: of the unsharded parameter.

    Returns:
        A new dict; the DTensors share the memory of the local tensors.
    """
    from torch.distributed.tensor import DTensor

    wrapped: State = {}
    for name, local in state.items():
        if name == "step":
            wrapped[name] = local
            continue
        shape = torch.Size(global_shape)
        if name.endswith("_absmax"):
            shape = torch.Size((_checks.rows_of(global_shape)[0], *local.shape[1:]))
        elif name == "param_remainder":
            shape = torch.Size((*global_shape, 2))
        # The shape cannot be told from one rank's rows: shards may be uneven or empty.
        wrapped[name] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=_contiguous_strides(shape)
        )
    return wrapped


def _contiguous_strides(shape: Shape) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return tuple(strides)


def row_range(rows: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the first row and the number of rows of a rank, cut as torch.chunk and Shard(0) do.

    Example:
        >>> [row_range(7, 4, rank) for rank in range(4)]
        [(0, 2), (2, 2), (4, 2), (6, 1)]
    """
    each = -(-rows // world_size)
    first = min(rank * each, rows)
    return first, min(each, rows - first)


def is_row_sharded(dtensor: Any) -> bool:
    """Whether every placement is Shard(0) or Replicate, so that this rank holds a run of rows."""
    from torch.distributed.tensor import Replicate, Shard

    # By type: _StridedShard is no Shard in some versions of torch and is one in others.
    return all(
        type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)
        for placement in dtensor.placements
    )


def first_element(dtensor: Any) -> int:
    """Return the index in the whole tensor of the first element that this rank holds.

    Args:
        dtensor: a DTensor whose placements are Shard(0) and Replicate.

    Raises:
        NotImplementedError: for other placements: the local elements are no run of the whole.
    """
    if not is_row_sharded(dtensor):
        rule = "be placed by Shard(0) and Replicate()"
        _checks.reject(NotImplementedError, "first_element", "dtensor", rule, dtensor.placements)
    first, count = 0, dtensor.shape[0] if dtensor.dim() else 1
    coordinate = dtensor.device_mesh.get_coordinate()
    for size, index, placement in zip(
        dtensor.device_mesh.shape, coordinate, dtensor.placements, strict=True
    ):
        if placement.is_shard():
            offset, count = row_range(count, size, index)
            first += offset
    return int(first * math.prod(dtensor.shape[1:]))


def step_parameters(
    items: Sequence[StepItem],
    group: Group,
    *,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Step every parameter of a list by `feinwerk.adamw_step`, one call a kind, and count the step.

    A kind is the dtypes of parameter, gradient and states, and the device. A parameter that is not
    contiguous is stepped as a copy.

    Args:
        items: local tensors; states may be DTensors. Shards without elements are only counted.
        group: a parameter group: `lr`, `betas`, `eps`, `weight_decay`, `blocksize`, `maximize`,
            `seed`.
        clip_coef: as `feinwerk.adamw_step` takes it.
        grad_scale: as `feinwerk.adamw_step` takes it.

    Raises:
        TypeError: as `feinwerk.adamw_step` does.
        ValueError: likewise.
    """
    kinds: dict[tuple[Any, ...], list[StepItem]] = {}
    for item in items:
        if item.param.numel() > 0:
            state = item.state
            name = "exp_avg_codes" if "exp_avg_codes" in state else "exp_avg"
            kind = (
                item.param.dtype, item.grad.dtype, state[name].dtype, "param_remainder" in state,
                item.param.device,
            )  # fmt: skip
            kinds.setdefault(kind, []).append(item)
    for kind, members in kinds.items():
        _step_kind(members, group, kind[2] is torch.uint8, kind[3], clip_coef, grad_scale)
    if items:
        torch._foreach_add_([item.state["step"] for item in items], 1)


def _step_kind(
    items: Sequence[StepItem],
    group: Group,
    quantized: bool,
    remainders: bool,
    clip_coef: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> None:
    def states(name: str) -> list[torch.Tensor]:
        return [to_local(item.state[name]) for item in items]

    params = [item.param.contiguous() for item in items]
    stochastic = params[0].dtype is torch.bfloat16 and not remainders
    suffix = "_codes" if quantized else ""
    beta1, beta2 = group["betas"]
    adamw_step(
        params,
        [item.grad for item in items],
        states(f"exp_avg{suffix}"),
        states(f"exp_avg_sq{suffix}"),
        states("exp_avg_absmax") if quantized else (),
        states("exp_avg_sq_absmax") if quantized else (),
        [words.view(torch.int16).squeeze(-1) for words in states("param_remainder")]
        if remainders
        else (),
        steps=[int(item.state["step"]) + 1 for item in items],
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        blocksize=group["blocksize"],
        maximize=group["maximize"],
        parameter_ids=[item.parameter_id for item in items],
        first_elements=[item.first_element for item in items],
        seed=torch.tensor(group["seed"]) if stochastic else None,
        clip_coef=clip_coef,
        grad_scale=grad_scale,
    )
    for item, stepped in zip(items, params, strict=True):
        if stepped is not item.param:
            item.param.copy_(stepped)
