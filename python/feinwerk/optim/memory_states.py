"""MemoryStates: states of buckets that stay in memory. States on disk have the same methods.

A step goes `begin`, then `take` and `put` for every bucket, then `commit`, or `abandon` instead.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence

import torch

from feinwerk.optim.buckets import Bucket, Slot
from feinwerk.optim.state import State


class MemoryStates:
    """Make a state when its parameter is first stepped, and keep it in the optimizer.

    Args:
        state: the optimizer's; to be replaced when that is (`load_state_dict` does so).
        params: parameters, as the slots of the buckets count them.
        buckets: of them.
        make: returns the state of this rank's rows before the first step.
    """

    def __init__(
        self,
        state: MutableMapping[torch.Tensor, State],
        params: Sequence[torch.Tensor],
        buckets: Sequence[Bucket],
        make: Callable[[Slot], State],
    ) -> None:
        """See the class."""
        self.state, self._params, self._buckets, self._make = state, params, buckets, make

    def counters(self) -> list[int]:
        """How many steps each parameter has taken."""
        states = (self.state.get(param) for param in self._params)
        return [int(state["step"]) if state else 0 for state in states]

    def begin(self, order: Sequence[int]) -> None:
        """Say which buckets will be taken, in this order."""

    def take(self, bucket: int, slots: Sequence[Slot]) -> list[State]:
        """The states of some slots of a bucket, to be changed in place until `put`."""
        states = []
        for slot in slots:
            param = self._params[slot.index]
            if not self.state.get(param):
                self.state[param] = self._make(slot)
            states.append(self.state[param])
        return states

    def put(self, bucket: int) -> None:
        """Give the bucket back that was taken."""

    def commit(self) -> None:
        """Make what has been changed count."""

    def abandon(self) -> None:
        """Stop before `commit`."""

    def absorb(self) -> None:
        """Take over what others have put into the optimizer's state: it is in place already."""

    def empty_state(self, param: torch.Tensor) -> State:
        """The state of a parameter before its first step, to read a saved one into."""
        slots = (slot for bucket in self._buckets for slot in bucket.slots)
        return self._make(next(slot for slot in slots if self._params[slot.index] is param))

    def drop(self) -> None:
        """Take out of memory what is in files as well: nothing is."""

    def close(self) -> None:
        """Let go what is no memory: nothing is."""
