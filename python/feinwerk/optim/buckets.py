"""Which rows of which parameters lie where in a bucket: pure arithmetic, no process group.

```
   parameters        a bucket of 3 ranks: one section a rank, each sent in one piece
   A  7 rows         ┌ section of rank 0 ┬ section of rank 1 ┬ section of rank 2 ┐
   B  2 rows         │ A 0 1 2 │ B 0     │ A 3 4 5 │ B 1     │ A 6 . . │ B .     │   . = padding
                     └─────────┴─────────┴─────────┴─────────┴─────────┴─────────┘
```
Rows are cut as torch.chunk and DTensor's Shard(0) cut them: ceil(rows / world size) to each rank,
until none is left. A parameter starts at the same place of every section.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from feinwerk import _checks
from feinwerk.optim.state import row_range

_OP = "make_buckets"


@dataclass(frozen=True)
class Slot:
    """Where the rows of one parameter lie in the sections of a bucket.

    Attributes:
        index: of the parameter, in the list that `make_buckets` got.
        shape: of the whole parameter. An element of a vector is a row.
        offset: of its first element in every section.
        world_size: how many ranks share the rows. A number (0-dim) is a row of all ranks: it
            cannot be cut, so that all of them step it.
    """

    index: int
    shape: tuple[int, ...]
    offset: int
    world_size: int

    @cached_property
    def rows(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[0] if self.shape else 1

    @cached_property
    def row(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @cached_property
    def each(self) -> int:
        """Rows that a section has room for."""
        return -(-self.rows // self.world_size) if self.shape else 1

    @cached_property
    def room(self) -> int:
        """Elements that a section has room for."""
        return self.each * self.row

    def row_range(self, rank: int) -> tuple[int, int]:
        """The first row of a rank, and how many it has."""
        return row_range(self.rows, self.world_size, rank) if self.shape else (0, 1)

    def rows_of(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The rows of a rank, as a view of a tensor of the whole shape."""
        if not self.shape:
            return tensor
        first, count = self.row_range(rank)
        return tensor[first : first + count]

    def in_section(self, section: torch.Tensor, rank: int) -> torch.Tensor:
        """The rows of a rank, as a view of its section."""
        count = self.row_range(rank)[1]
        shape = (count, *self.shape[1:]) if self.shape else ()
        return section[self.offset : self.offset + count * self.row].view(shape)

    def pack(
        self, tensor: torch.Tensor | None, sections: torch.Tensor, first_rank: int = 0
    ) -> None:
        """Copy the rows of some ranks into their sections; None stands for zeros.

        Args:
            tensor: of the whole shape, converted to the dtype of the sections.
            sections: [ranks, section], of consecutive ranks; the padding is set to zero.
            first_rank: whose section is the first one.
        """
        place = sections[:, self.offset : self.offset + self.room]
        if tensor is None:
            place.zero_()
        elif not self.shape:
            place.copy_(tensor.expand(place.shape))
        else:
            for to_pack, rows in self._runs(tensor, place, first_rank):
                to_pack.copy_(rows)
            padded = max(0, self._full - first_rank)
            if padded < len(sections):
                rest = self.row_range(first_rank + padded)[1] * self.row
                place[padded, rest:].zero_()
                place[padded + 1 :].zero_()

    def unpack(self, sections: torch.Tensor, tensor: torch.Tensor, first_rank: int = 0) -> None:
        """Copy the rows of some ranks from their sections: what `pack` did, backwards."""
        place = sections[:, self.offset : self.offset + self.room]
        if not self.shape:
            if len(sections):
                tensor.copy_(place[0, 0])
            return
        for packed, rows in self._runs(tensor, place, first_rank):
            rows.copy_(packed)

    def _runs(
        self, tensor: torch.Tensor, place: torch.Tensor, first_rank: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of views of equal elements: those of full ranks, then those of the one after."""
        full = min(self._full, first_rank + len(place))
        count, first_row = full - first_rank, first_rank * self.each
        if count > 0:
            packed = place[:count].view(count, self.each, *self.shape[1:])
            rows = tensor[first_row : full * self.each]
            # A view whatever the strides are.
            yield packed, torch.unflatten(rows, 0, (count, self.each))
        if first_rank <= self._full < first_rank + len(place):
            first_row, rest = self.row_range(self._full)
            if rest:
                packed = place[self._full - first_rank, : rest * self.row]
                yield packed.view(rest, *self.shape[1:]), tensor[first_row : first_row + rest]

    @cached_property
    def _full(self) -> int:
        """How many ranks have as many rows as there is room for."""
        return self.rows // self.each if self.each else self.world_size


@dataclass(frozen=True)
class Bucket:
    """Parameters that are reduced, stepped and gathered together.

    Attributes:
        slots: in the order in which they lie in a section.
        kind: what they have in common, such as dtype and device.
        world_size: sections, one a rank.
        section: elements of a section, padding included.
    """

    slots: tuple[Slot, ...]
    kind: Hashable
    world_size: int
    section: int

    @property
    def numel(self) -> int:
        """Elements of its parameters."""
        return sum(math.prod(slot.shape) for slot in self.slots)

    def local_numel(self, rank: int) -> int:
        """Elements whose states a rank keeps."""
        return sum(slot.row_range(rank)[1] * slot.row for slot in self.slots)


def make_buckets(
    shapes: Sequence[Sequence[int]],
    kinds: Sequence[Hashable],
    element_sizes: Sequence[int],
    world_size: int,
    capacity: int,
) -> list[Bucket]:
    """Return the buckets of parameters, last parameter first, as a backward comes to them.

    A bucket takes parameters of its kind until the next one would not fit; one parameter is never
    split, so that a large one has a bucket for itself. Buckets are in the order in which a backward
    that goes through the parameters in reverse completes them.

    Args:
        shapes: of the parameters.
        kinds: of each; a bucket has one kind.
        element_sizes: bytes an element of each.
        world_size: number of ranks.
        capacity: bytes a bucket.

    Raises:
        ValueError: if capacity or world_size is below 1.

    Example:
        >>> for bucket in make_buckets([(7, 5), (2, 5)], ["fp32"] * 2, [4, 4], 3, 1 << 20):
        ...     print(bucket.section, [(slot.index, slot.offset) for slot in bucket.slots])
        20 [(1, 0), (0, 5)]
    """
    for name, value in (("world_size", world_size), ("capacity", capacity)):
        _checks.positive(_OP, name, value)
    members: list[list[int]] = []
    sizes: list[int] = []
    open_buckets: dict[Hashable, int] = {}
    for index in reversed(range(len(shapes))):
        size = math.prod(shapes[index]) * element_sizes[index]
        bucket = open_buckets.get(kinds[index])
        if bucket is None or sizes[bucket] + size > capacity:
            bucket = open_buckets[kinds[index]] = len(members)
            members.append([])
            sizes.append(0)
        members[bucket].append(index)
        sizes[bucket] += size
    members.sort(key=lambda indices: -indices[-1])
    buckets = []
    for indices in members:
        slots, offset = [], 0
        for index in indices:
            slots.append(Slot(index, tuple(shapes[index]), offset, world_size))
            offset += slots[-1].room
        buckets.append(Bucket(tuple(slots), kinds[indices[0]], world_size, offset))
    return buckets
