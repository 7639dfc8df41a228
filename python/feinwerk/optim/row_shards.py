"""RowShards: states of the rows of plain parameters that a rank keeps, as DTensors, and where."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from feinwerk import _checks
from feinwerk.optim.buckets import Slot
from feinwerk.optim.collectives import Collectives
from feinwerk.optim.disk_format import TensorSpec
from feinwerk.optim.disk_offload import DiskOffload
from feinwerk.optim.memory_states import MemoryStates
from feinwerk.optim.sharded_layout import Groups, ShardedLayout, make_layout, signature
from feinwerk.optim.state import Group, State, new_state, row_range, wrap_state


@dataclass(frozen=True)
class Offload:
    """Where states are kept.

    Attributes:
        kind: None: beside their parameters; "cpu": in memory of the host, pinned for parameters of
            another device; "disk": in files.
        directory: of the files of all ranks.
        fsync: see `DiskStates`.
    """

    kind: str | None
    directory: str | os.PathLike[str] | None
    fsync: bool

    def check(self, op: str) -> None:
        """Reject an unknown kind, and a directory without "disk" or the other way round."""
        if self.kind not in (None, "cpu", "disk"):
            rule = 'be None, "cpu" or "disk"'
            _checks.reject(ValueError, op, "offload", rule, repr(self.kind))
        if (self.kind == "disk") != (self.directory is not None):
            rule = 'be given with offload="disk", and only then'
            _checks.reject(ValueError, op, "offload_directory", rule, repr(self.directory))


States = MemoryStates | DiskOffload


class RowShards:
    """States of this rank's rows, Shard(0) over the group; of numbers, Replicate.

    Args:
        op: the optimizer's name, for messages.
        collectives: of the ranks; None: one process without a group, whose states are plain.
        offload: where they are.
        capacity: bytes a bucket.
    """

    def __init__(
        self, op: str, collectives: Collectives | None, offload: Offload, capacity: int
    ) -> None:
        """See the class."""
        self._op, self._collectives = op, collectives
        self._offload, self._capacity = offload, capacity
        self._meshes: dict[str, Any] = {}
        self._layout: ShardedLayout | None = None
        self._states: States | None = None

    def layout(self, groups: Groups) -> ShardedLayout:
        """The layout of an optimizer's groups, made anew when their parameters have changed."""
        if self._layout is None or self._layout.signature != signature(groups):
            world_size = 1 if self._collectives is None else self._collectives.world_size
            self._layout = make_layout(self._op, groups, world_size, self._capacity)
            self.close()  # what the optimizer shows goes over to the next files
        return self._layout

    def states(self, state: MutableMapping[torch.Tensor, State], groups: Groups) -> States:
        """What gives a step its states, for the layout of these groups.

        Args:
            state: the optimizer's, where they are shown.
            groups: the optimizer's.

        Raises:
            OffloadError: if there is no room for them on disk.
        """
        layout = self.layout(groups)
        if self._states is not None:
            self._states.state = state
            return self._states

        def make(slot: Slot) -> State:
            return self.new_state(layout.params[slot.index], groups[layout.groups[slot.index]])

        def spec(slot: Slot) -> dict[str, TensorSpec]:
            param, group = layout.params[slot.index], groups[layout.groups[slot.index]]
            state = new_state(self._rows(param).to("meta"), param.shape, group)
            return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}

        def show(slot: Slot, rows: State) -> State:
            return self._placed(rows, layout.params[slot.index])

        ranks = self._collectives
        if self._offload.directory is None:
            self._states = MemoryStates(state, layout.params, layout.buckets, make)
        else:
            self._states = DiskOffload(
                state,
                layout.params,
                layout.buckets,
                spec,
                show,
                self._offload.directory,
                0 if ranks is None else ranks.rank,
                1 if ranks is None else ranks.world_size,
                self._offload.fsync,
            )
        return self._states

    def close(self) -> None:
        """Let files go; states that are shown stay usable."""
        if self._states is not None:
            self._states.close()
            self._states = None

    def new_state(self, param: torch.Tensor, group: Group) -> State:
        """The state before the first step."""
        state = new_state(self._rows(param), param.shape, group)
        if self._offload.kind == "cpu" and self._is_moved(param):
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

        # A mesh of the states' device: DTensor.from_local moves what is elsewhere to the mesh's.
        kind = "cpu" if self._is_moved(param) else param.device.type
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
        return rows.to("cpu") if self._is_moved(param) else rows

    def _is_moved(self, param: torch.Tensor) -> bool:
        return self._offload.kind is not None and param.device.type != "cpu"
