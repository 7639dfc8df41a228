"""ShardedStep: one step over the buckets of a layout, as all ranks take it together.

```
   agree   all-reduce (MAX): which parameters are used, the first bad one, a hash of all options
           all-reduce (SUM): the norm's integers, if it is asked for
   step    for each bucket: step this rank's rows ──> all-gather, beside the next bucket's step
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from feinwerk.ops import square_sum
from feinwerk.optim.agreement import Facts, compare, facts_fingerprint, same_everywhere
from feinwerk.optim.buckets import Bucket, Slot
from feinwerk.optim.collectives import Collectives, reached
from feinwerk.optim.disk_offload import DiskOffload
from feinwerk.optim.errors import ShardingError
from feinwerk.optim.gatherer import ParameterGatherer
from feinwerk.optim.gradient_norm import norm_of
from feinwerk.optim.host_transfers import to_device, to_host
from feinwerk.optim.local_gradients import LocalGradients
from feinwerk.optim.memory_states import MemoryStates
from feinwerk.optim.reducer import GradientReducer
from feinwerk.optim.sharded_layout import ShardedLayout
from feinwerk.optim.state import StepItem, step_parameters
from feinwerk.optim.transfer_buffers import TransferBuffers

_NONE = 1 << 62  # no parameter
_BUCKETS_UNDER_WAY = 4


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken.

    Attributes:
        stage: 1 or 2.
        capacity: bytes a bucket.
        reduce_gradients: whether gradients are averaged here.
        overlap: whether transfers run beside computation.
    """

    stage: int
    capacity: int
    reduce_gradients: bool
    overlap: bool


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on before a step.

    Attributes:
        used: for each parameter of the layout, whether some rank has a gradient of it.
        found_inf: whether some rank said so.
        nonfinite: index, over all groups, of the first parameter whose averaged gradient is not
            finite; None if all are or nobody looked.
        norm: of the averaged gradients, or None.
    """

    used: list[bool]
    found_inf: bool
    nonfinite: int | None
    norm: float | None


class ShardedStep:
    """See the module's text.

    Args:
        op: the optimizer's name, for messages.
        layout: of the optimizer's parameters.
        collectives: of the ranks; None: there is only this one.
        states: of the buckets; the seam where states on disk come in.
        options: how.
    """

    def __init__(
        self,
        op: str,
        layout: ShardedLayout,
        collectives: Collectives | None,
        states: MemoryStates | DiskOffload,
        options: StepOptions,
    ) -> None:
        """Begin without gradients."""
        self._op, self.layout, self.collectives, self.states = op, layout, collectives, states
        self._rank = 0 if collectives is None else collectives.rank
        self._gatherer: ParameterGatherer | None = None
        self.gradients: GradientReducer | LocalGradients = LocalGradients(
            layout.params, layout.buckets, self._rank
        )
        if collectives is None or collectives.world_size == 1:
            return
        limit = _BUCKETS_UNDER_WAY * options.capacity
        buffers = TransferBuffers(2 * limit)
        self._gatherer = ParameterGatherer(
            layout.params, collectives, buffers, overlap=options.overlap, limit=limit
        )
        if options.reduce_gradients:
            self.gradients = GradientReducer(
                layout.params, layout.names, layout.buckets, collectives, buffers,
                keep_gradients=options.stage == 1, overlap=options.overlap, limit=limit,
            )  # fmt: skip

    def check_no_new_gradients(self, groups: list[dict[str, Any]]) -> None:
        """Refuse gradients of parameters that came after others have been reduced."""
        for group in groups:
            for param in group["params"]:
                if param.grad is not None and id(param) not in self.layout.position:
                    raise ShardingError(
                        f"{self._op}: parameters must stay the same between backward and step, got "
                        f"a gradient for a new one of shape {tuple(param.shape)}"
                    )

    def agree(
        self, facts: Callable[[], Facts], found_inf: bool, check_finite: bool, want_norm: bool
    ) -> Verdict:
        """Wait for the gradients, and find out together what is to be done with them; collective.

        Args:
            facts: what must be the same on all ranks.
            found_inf: what this rank's GradScaler says.
            check_finite: look for the first parameter that is not finite.
            want_norm: compute the norm.

        Raises:
            Disagreement: on all ranks, if facts differ.
        """
        used = self.gradients.finish()
        limbs = None
        if want_norm:
            buckets = enumerate(self.layout.buckets)
            rows = [row for i, bucket in buckets for row in self._counted(i, bucket, used)]
            limbs = square_sum(rows).cpu()
        bad = self._first_nonfinite(used) if check_finite else _NONE
        collectives = self.collectives
        if collectives is not None and collectives.world_size > 1:
            mine = facts_fingerprint(facts())
            control = torch.tensor([mine, -mine, -bad, int(found_inf), *used])
            control = collectives.all_reduce(control, dist.ReduceOp.MAX, "agree")
            highest, highest_negative, negative_bad, found, *anywhere = control.tolist()
            if not same_everywhere(highest, highest_negative):
                compare(collectives, self._op, facts, "agree")
            used, bad, found_inf = [bool(one) for one in anywhere], -negative_bad, bool(found)
            if limbs is not None:
                limbs = collectives.all_reduce(limbs, dist.ReduceOp.SUM, "agree on the norm")
        norm = None if limbs is None else norm_of(limbs)
        return Verdict(used, found_inf, None if bad == _NONE else bad, norm)

    def _counted(self, i: int, bucket: Bucket, used: list[bool]) -> list[torch.Tensor]:
        """Rows whose squares this rank adds to the norm."""
        return [
            self.gradients.gradient(i, slot)
            for slot in bucket.slots
            if (slot.shape or self._rank == 0)  # numbers are on all ranks
            and (used[slot.index] or isinstance(self.gradients, GradientReducer))
        ]

    def _first_nonfinite(self, used: list[bool]) -> int:
        # An infinity or a NaN survives every sum, so that one pass mostly suffices; the host waits
        # for the answers of all buckets of a device together.
        finite: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for i in range(len(self.layout.buckets)):
            if sums := self.gradients.sums(i):
                answer = torch.stack(sums).isfinite().all()
                finite.setdefault(answer.device, []).append((i, answer))
        bad = _NONE
        for answers in finite.values():
            flags = torch.stack([answer for _, answer in answers]).tolist()
            for i in (i for (i, _), flag in zip(answers, flags, strict=True) if not flag):
                for slot in self.layout.buckets[i].slots:
                    if not bool(self.gradients.gradient(i, slot).isfinite().all()):
                        bad = min(bad, self.layout.indices[slot.index])
        return bad

    def step(
        self,
        groups: list[dict[str, Any]],
        used: list[bool],
        clip_coef: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
    ) -> None:
        """Step and gather the parameters that are used; collective.

        Args:
            groups: the optimizer's.
            used: as agreed.
            clip_coef: as `feinwerk.adamw_step` takes it.
            grad_scale: likewise.
        """
        todo = [
            (i, bucket, slots)
            for i, bucket in enumerate(self.layout.buckets)
            if (slots := [slot for slot in bucket.slots if used[slot.index]])
        ]
        reached("between reduce-scatter and step")
        if self.collectives is not None:
            self.collectives.tell("step")
        self.states.begin([i for i, _, _ in todo])
        try:
            for i, bucket, slots in todo:
                self._step_rows(i, slots, groups, clip_coef, grad_scale)
                reached("in step")
                if self._gatherer is not None:
                    reached("before all-gather")
                    self._gatherer.launch(i, bucket, slots)
            if self._gatherer is not None:
                self._gatherer.finish()
        except BaseException:
            self.states.abandon()
            raise
        self.states.commit()

    def _step_rows(
        self,
        i: int,
        slots: list[Slot],
        groups: list[dict[str, Any]],
        clip_coef: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
    ) -> None:
        layout = self.layout
        states = self.states.take(i, slots)
        rows = [slot.rows_of(layout.params[slot.index].detach(), self._rank) for slot in slots]
        grads = [self.gradients.gradient(i, slot) for slot in slots]
        back: list[tuple[torch.Tensor, torch.Tensor]] = []
        local = rows
        home = next(tensor.device for name, tensor in states[0].items() if name != "step")
        if home != rows[0].device:  # offloaded; a bucket has one device
            copies = to_host([*rows, *grads])
            local, grads = copies[: len(rows)], copies[len(rows) :]
            back = list(zip(rows, local, strict=True))
        by_group: dict[int, list[StepItem]] = {}
        for slot, state, param, grad in zip(slots, states, local, grads, strict=True):
            first = slot.row_range(self._rank)[0] * slot.row
            item = StepItem(param, grad, state, layout.indices[slot.index], first)
            by_group.setdefault(layout.groups[slot.index], []).append(item)
        for group, items in by_group.items():
            step_parameters(items, groups[group], clip_coef=clip_coef, grad_scale=grad_scale)
        self.states.put(i)
        to_device(back)
