"""DiskOffload: states of buckets in files. States in memory have the same methods.

```
   optimizer.state[p]   "step"          a tensor in memory
                        all others      maps of the record that counts; after every step they are
                                        replaced by maps of the other record
   a step               works on buffers, at most three buckets of them
```
What else is put into `optimizer.state` (by `load_state_dict`, say) is moved to the files before the
next step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import torch

from feinwerk.optim.buckets import Bucket, Slot
from feinwerk.optim.disk_format import TensorSpec
from feinwerk.optim.disk_states import DiskStates
from feinwerk.optim.state import INITIAL_VALUES, State, to_local


class DiskOffload:
    """Keep the states of this rank's rows in files, and maps of them in the optimizer.

    Args:
        state: the optimizer's; to be replaced when that is (`load_state_dict` does so).
        params: parameters, as the slots of the buckets count them.
        buckets: of them.
        spec: returns dtypes and shapes of the state of this rank's rows.
        wrap: returns the local tensors of a state as the optimizer shows them.
        directory: of all ranks; this one uses a directory `rank-<rank>` in it.
        rank: this one.
        world_size: how many there are.
        fsync: see `DiskStates`.

    Raises:
        OffloadError: as `DiskStates` does.
    """

    def __init__(
        self,
        state: MutableMapping[torch.Tensor, State],
        params: Sequence[torch.Tensor],
        buckets: Sequence[Bucket],
        spec: Callable[[Slot], Mapping[str, TensorSpec]],
        wrap: Callable[[Slot, State], State],
        directory: str | os.PathLike[str],
        rank: int,
        world_size: int,
        fsync: bool,
    ) -> None:
        """Reserve the room on disk; it is filled before the first step."""
        self.state, self._params, self._buckets = state, params, buckets
        self._wrap = wrap
        self._place = {
            id(params[slot.index]): (i, slot)
            for i, bucket in enumerate(buckets)
            for slot in bucket.slots
        }
        specs = [
            {_key(slot, name): one for slot in bucket.slots for name, one in spec(slot).items()}
            for bucket in buckets
        ]
        self._names = [list(spec) for spec in specs]
        identity = f"rank {rank} of {world_size}"
        self._disk = DiskStates(
            Path(directory) / f"rank-{rank}", specs, identity=identity, fsync=fsync
        )
        # The maps of each parameter's two records, made once each: they are known again by `is`.
        self._maps: dict[tuple[int, int], State] = {}
        self._known: set[int] = set()  # parameters that have a state
        self._taken: dict[int, list[tuple[Slot, State]]] = {}
        self._steps: dict[int, float] = {}  # of the parameters that this step has stepped

    def counters(self) -> list[int]:
        """How many steps each parameter has taken."""
        states = (self.state.get(param) for param in self._params)
        return [int(state["step"]) if state else 0 for state in states]

    def begin(self, order: Sequence[int]) -> None:
        """Say which buckets will be taken, in this order; the first is read."""
        self.absorb()
        self._taken, self._steps = {}, {}
        self._disk.begin(order)

    def take(self, bucket: int, slots: Sequence[Slot]) -> list[State]:
        """The states of some slots of a bucket, to be changed in place until `put`."""
        tensors = self._disk.take(bucket)
        states = []
        for slot in slots:
            state = {name: tensors[_key(slot, name)] for name in self._names_of(bucket, slot)}
            shown = self.state.get(self._params[slot.index])
            state["step"].fill_(float(shown["step"]) if shown else 0.0)
            states.append(state)
        self._taken[bucket] = list(zip(slots, states, strict=True))
        return states

    def put(self, bucket: int) -> None:
        """Give the bucket back that was taken."""
        taken = self._taken[bucket]
        self._steps |= {slot.index: float(state["step"]) for slot, state in taken}
        self._disk.put(bucket)

    def commit(self) -> None:
        """Make what has been changed count, and show it."""
        self._disk.commit()
        self._known |= set(self._steps)
        for bucket in self._taken:
            self._show(bucket)
        self._taken, self._steps = {}, {}

    def abandon(self) -> None:
        """Stop before `commit`: the states of the step before count on."""
        self._disk.abandon()

    def absorb(self) -> None:
        """Move to the files what others have put into the optimizer's state, a bucket at a time.

        Raises:
            ValueError: if that is not what a state of the parameter is made of.
            OffloadError: if the disk fails; the optimizer's state is as it was.
        """
        first = self._disk.generation == 0
        changed = [
            i
            for i, bucket in enumerate(self._buckets)
            if first or any(self._is_foreign(i, slot) for slot in bucket.slots)
        ]
        if not changed and not first:
            return
        self._disk.fill((self._record(i) for i in changed), changed)
        for i in changed:
            for slot in self._buckets[i].slots:
                has_state = bool(self.state.get(self._params[slot.index]))
                (self._known.add if has_state else self._known.discard)(slot.index)
            self._show(i)

    def empty_state(self, param: torch.Tensor) -> State:
        """Maps of a parameter's record to read a state into, and a `step` in memory.

        It has the values of a parameter that was never stepped, or those of its last step.
        """
        self.absorb()
        return {"step": torch.zeros(()), **self._mapped(*self._place[id(param)])}

    def drop(self) -> None:
        """Take out of memory what was read or written through the maps."""
        self._disk.drop()

    def close(self) -> None:
        """Let the files go; what is shown stays usable."""
        self._disk.close()

    def _names_of(self, bucket: int, slot: Slot) -> list[str]:
        prefix = f"{slot.index}."
        return [key[len(prefix) :] for key in self._names[bucket] if key.startswith(prefix)]

    def _mapped(self, bucket: int, slot: Slot) -> State:
        """What the optimizer shows of a parameter, but for `step`."""
        which = slot.index, self._disk.slot(bucket)
        if which not in self._maps:
            tensors = self._disk.tensors(bucket)
            names = [name for name in self._names_of(bucket, slot) if name != "step"]
            self._maps[which] = self._wrap(slot, {n: tensors[_key(slot, n)] for n in names})
        return self._maps[which]

    def _show(self, bucket: int) -> None:
        for slot in self._buckets[bucket].slots:
            if slot.index in self._known:
                param = self._params[slot.index]
                if not self.state.get(param):
                    self.state[param] = {"step": torch.zeros(())}
                state = self.state[param]
                state.update(self._mapped(bucket, slot))
                if slot.index in self._steps:
                    state["step"].fill_(self._steps[slot.index])

    def _is_foreign(self, bucket: int, slot: Slot) -> bool:
        state = self.state.get(self._params[slot.index])
        if not state or slot.index not in self._known:
            return bool(state) or slot.index in self._known
        mapped = self._mapped(bucket, slot)
        same = all(state.get(name) is tensor for name, tensor in mapped.items())
        return not same or len(state) != len(mapped) + 1

    def _record(self, bucket: int) -> dict[str, torch.Tensor | int]:
        """What the record of a bucket is filled with."""
        if self._disk.generation:
            self._disk.drop()  # of the bucket before, if it came from maps
        record: dict[str, torch.Tensor | int] = {}
        for slot in self._buckets[bucket].slots:
            state = self.state.get(self._params[slot.index])
            if not state:
                for name in self._names_of(bucket, slot):
                    record[_key(slot, name)] = INITIAL_VALUES.get(name, 0)
                continue
            for name, tensor in state.items():
                record[_key(slot, name)] = to_local(tensor)
        return record


def _key(slot: Slot, name: str) -> str:
    return f"{slot.index}.{name}"
