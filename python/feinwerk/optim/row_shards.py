"""RowShards: states of the rows of plain parameters that a rank keeps, as DTensors."""

from __future__ import annotations

from typing import Any

import torch

from feinwerk.optim.collectives import Collectives
from feinwerk.optim.state import Group, State, new_state, row_range, wrap_state


class RowShards:
    """States of this rank's rows, Shard(0) over the group; of numbers, Replicate.

    Args:
        collectives: of the ranks; None: one process without a group, whose states are plain.
        offload: "cpu" keeps states of other devices' parameters in pinned host memory.
    """

    def __init__(self, collectives: Collectives | None, offload: str | None) -> None:
        """See the class."""
        self._collectives, self._offload = collectives, offload
        self._meshes: dict[str, Any] = {}

    def new_state(self, param: torch.Tensor, group: Group) -> State:
        """The state before the first step."""
        state = new_state(self._rows(param), param.shape, group)
        if self._pins(param):
            state = {name: tensor.pin_memory() for name, tensor in state.items()}
        return self._placed(state, param)

    def like(self, param: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape and dtype that is placed as its states are."""
        return self._placed({"rows": self._rows(param)}, param)["rows"]

    def _placed(self, state: State, param: torch.Tensor) -> State:
        if self._collectives is None:
            return state
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Replicate, Shard

        kind = param.device.type
        if kind not in self._meshes:
            self._meshes[kind] = DeviceMesh.from_group(self._collectives.group, kind)
        placements = [Shard(0) if param.dim() else Replicate()]
        return wrap_state(state, self._meshes[kind], placements, param.shape)

    def _rows(self, param: torch.Tensor) -> torch.Tensor:
        rows = param.detach()
        if self._collectives is not None and param.dim():
            world_size, rank = self._collectives.world_size, self._collectives.rank
            first, count = row_range(param.shape[0], world_size, rank)
            rows = rows[first : first + count]
        return rows.to("cpu") if self._pins(param) else rows

    def _pins(self, param: torch.Tensor) -> bool:
        return self._offload == "cpu" and param.device.type != "cpu"
