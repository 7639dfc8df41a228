"""ShardedAdamW: ZeRO-1 and ZeRO-2 over plain, replicated parameters on torch.distributed."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from feinwerk import _checks
from feinwerk.optim.adamw import AdamW
from feinwerk.optim.agreement import Facts, agree
from feinwerk.optim.collectives import Collectives, reached
from feinwerk.optim.gradient_hooks import GradientHooks
from feinwerk.optim.gradient_norm import clip_coefficient
from feinwerk.optim.group import parameter_name
from feinwerk.optim.row_shards import Offload, RowShards
from feinwerk.optim.sharded_layout import hyper_parameters, layout_facts, signature, step_facts
from feinwerk.optim.sharded_step import ShardedStep, StepOptions
from feinwerk.optim.state import State
from feinwerk.optim.tensor_hash import hash_bytes

_OP = "ShardedAdamW"


class ShardedAdamW(AdamW):
    """AdamW whose states, and with stage 2 gradients, are spread over the ranks of a group.

        rank r keeps the states of rows [r n, (r + 1) n) of every parameter, n = ceil(rows / ranks)

        backward: bucket by bucket, average the gradients of these rows over all ranks
        step:     step these rows, then give them to everybody

    For parameters that every rank holds in full (what DDP takes, without the DDP wrapper); under
    `fully_shard` use `AdamW`. It sends 2 P (N - 1) / N elements a step and rank, as an all-reduce
    of the gradients does, and the states take 1 / N of the memory. Frozen parameters cost nothing.
    Given equal gradients, the parameters are those of `AdamW`, bit for bit, for every world size,
    stage and bucket size. One process without a group is a world of its own.

    Gradients are reduced while `backward` runs, so that they must not be changed between `backward`
    and `step`: clip with `max_grad_norm`, scale with `feinwerk.optim.GradScaler`. Every rank calls
    `backward` equally often, and `step`; parameters without a gradient, on some ranks or all, are
    agreed on. With stage 2, `step` consumes the gradients, also without `zero_grad`. Closures work
    as in torch.

    States are DTensors over the group, Shard(0) (Replicate for numbers), so that
    `torch.distributed.checkpoint` and `feinwerk.distributed` save and reshard them. A number of
    ranks that exceeds a parameter's rows leaves some ranks without any of it.

    Args:
        params: as `AdamW` takes them; plain tensors. Two Parameters must not share memory.
        lr: as all options up to `seed`, see `AdamW`. `layout="flat"` is not supported.
        betas: see `AdamW`.
        eps: see `AdamW`.
        weight_decay: see `AdamW`.
        process_group: of torch.distributed; default all ranks.
        stage: 1 keeps `grad` as it is, for accumulation without communication; 2 drops every
            gradient as soon as it has been packed, and keeps the sum of this rank's rows.
        bucket_mb: megabytes of parameters that are sent together.
        reduce_gradients: average the gradients over the ranks. False: they have been already, by
            DDP or the HF Trainer.
        overlap: communicate beside the backward and the step; False to see what it is worth.
        offload: None; "cpu": keep the states in pinned host memory and step there; "disk": keep
            them in files, of which at most three buckets are in memory.
        offload_directory: of the files, for "disk"; each rank makes a directory in it. What earlier
            runs left there is overwritten: resume from checkpoints.
        offload_fsync: see `DiskStates`.
        timeout: seconds that this rank waits for the others in one phase.
        first_step_timeout: the same, until the first step is done.
        state_bits: see `AdamW`.
        blocksize: see `AdamW`.
        bf16_params: see `AdamW`.
        min_quantized_numel: see `AdamW`.
        max_grad_norm: see `AdamW`; the norm is that of the averaged gradients of all ranks, the
            same bits for every world size.
        skip_nonfinite: see `AdamW`; all ranks skip together.
        maximize: see `AdamW`.
        seed: see `AdamW`.

    Attributes:
        last_grad_norm: see `AdamW`; None unless `max_grad_norm` is set.
        skipped_steps: see `AdamW`.
        nonfinite_parameter: see `AdamW`; the first one over all ranks.
        found_inf_anywhere: whether the last step was left out, on all ranks, for a gradient that is
            not finite.
        tells_grad_scaler: whether `step` has been called by `feinwerk.optim.GradScaler`.

    Raises:
        TypeError: as `AdamW`, and for DTensors.
        ValueError: if an option breaks its rule.
        Disagreement: in the first `backward` or `step`, and in every later `step`, if ranks differ
            in parameters, options, learning rate or the number of steps.
        PeerFailure: in `backward` or `step`, if another rank died.
        PhaseTimeout: likewise, if another rank did not come in time.

    Source:
        ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv 1910.02054),
        section 5.

    Example:
        >>> layer = torch.nn.Linear(512, 512)
        >>> optimizer = ShardedAdamW(layer.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> layer(torch.ones(1, 512)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg_codes"].dtype
        torch.uint8
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        process_group: Any = None,
        stage: int = 2,
        bucket_mb: float = 25,
        reduce_gradients: bool = True,
        overlap: bool = True,
        offload: str | None = None,
        offload_directory: str | os.PathLike[str] | None = None,
        offload_fsync: bool = True,
        timeout: float = 120.0,
        first_step_timeout: float = 600.0,
        state_bits: int = 8,
        blocksize: int = 256,
        bf16_params: str = "remainder",
        min_quantized_numel: int = 4096,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the parameters and hook into their gradients; nothing is sent. See the class."""
        if stage not in (1, 2):
            _checks.reject(ValueError, _OP, "stage", "be 1 or 2", stage)
        self._offload = Offload(offload, offload_directory, offload_fsync)
        self._offload.check(_OP)
        positive = {"bucket_mb": bucket_mb, "timeout": timeout}
        for name, value in {**positive, "first_step_timeout": first_step_timeout}.items():
            if not 0 < value < math.inf:
                _checks.reject(ValueError, _OP, name, "be a number above 0", value)
        self.process_group, self.stage = process_group, stage
        self.reduce_gradients, self.offload = reduce_gradients, offload
        self.timeout, self.first_step_timeout = timeout, first_step_timeout
        self.found_inf_anywhere, self.tells_grad_scaler = False, False
        self._options = StepOptions(stage, int(bucket_mb * 2**20), reduce_gradients, overlap)
        self._collectives: Collectives | None = None
        self._connected = False
        self._row_shards: RowShards | None = None
        self._work: ShardedStep | None = None
        self._synchronizing = True
        self._hooks = GradientHooks(self._gradient_arrived)
        super().__init__(
            params, lr, betas, eps, weight_decay, state_bits=state_bits, blocksize=blocksize,
            bf16_params=bf16_params, min_quantized_numel=min_quantized_numel,
            max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite, maximize=maximize,
            seed=seed,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: a process group cannot be copied."""
        _checks.reject(TypeError, _OP, "optimizer", "be saved by its state_dict", "a copy of it")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, on all ranks before the same step.

        Raises:
            TypeError: as the class does; the group is not added then.
            ValueError: likewise.
        """
        super().add_param_group(param_group)
        if self.param_groups[-1]["layout"] != "rows":
            self.param_groups.pop()
            _checks.reject(ValueError, _OP, "layout", 'be "rows"', "'flat'")
        self._hooks.add(param for _, param, _ in self._parameters())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients in `grad` without communication; for all but the last micro-batch.

        Example:
            >>> layer = torch.nn.Linear(4, 4)
            >>> optimizer = ShardedAdamW(layer.parameters())
            >>> with optimizer.no_sync():
            ...     layer(torch.ones(1, 4)).sum().backward()
            >>> layer(torch.ones(1, 4)).sum().backward()
            >>> optimizer.step()
        """
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before
            if self._work is not None:
                self._work.gradients.stale = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those that have been reduced; on all ranks."""
        super().zero_grad(set_to_none)
        if self._work is not None:
            self._work.gradients.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient on some rank; all ranks call it.

        Args:
            closure: computes the loss and the gradients anew; called first.

        Returns:
            What the closure returned, or None.

        Raises:
            Disagreement: as the class does, also PeerFailure and PhaseTimeout.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        found_inf = float(getattr(self, "found_inf", None) or 0) != 0
        if grad_scale is not None and self._reduces() and not self.tells_grad_scaler:
            rule = "be feinwerk.optim.GradScaler, which all ranks tell the same"
            _checks.reject(TypeError, _OP, "scaler", rule, "another one")
        with torch.no_grad():
            self._sharded_step(grad_scale, found_inf)
        return loss

    def _sharded_step(self, grad_scale: torch.Tensor | None, found_inf: bool) -> None:
        for index, param, _ in self._parameters():
            self._check_gradient(index, param)
        work = self._prepared(at_step=True)
        work.states.state = self.state  # torch replaces it now and then
        groups = self.param_groups
        scale = 1.0 if grad_scale is None else float(grad_scale)
        verdict = work.agree(
            partial(self._step_facts, work, scale),
            found_inf,
            self.skip_nonfinite or grad_scale is not None,
            self.max_grad_norm is not None,
        )
        if verdict.norm is not None:
            self.last_grad_norm = verdict.norm / scale
        self.found_inf_anywhere = verdict.found_inf or verdict.nonfinite is not None
        if verdict.nonfinite is not None and grad_scale is None:
            self._skip_on_all(verdict.nonfinite)
        if not self.found_inf_anywhere:
            clip_coef = None
            if self.max_grad_norm is not None and self.last_grad_norm is not None:
                clip_coef = torch.tensor(clip_coefficient(self.last_grad_norm, self.max_grad_norm))
            # On the CPU, as the states may be when the scaler is not.
            on_cpu = None if grad_scale is None else torch.tensor(scale)
            work.step(groups, verdict.used, clip_coef, on_cpu)
        work.gradients.clear()
        if self._collectives is not None:
            self._collectives.timeout = self.timeout
            self._collectives.tell("between steps")
        if signature(groups) != work.layout.signature:
            self._work = None

    def _skip_on_all(self, index: int) -> None:
        self.skipped_steps += 1
        self.nonfinite_parameter = parameter_name(self.param_groups, index)
        warnings.warn(
            f"{_OP}: gradients must be finite, got a NaN or an infinity, first in "
            f"{self.nonfinite_parameter}; all ranks skip the step ({self.skipped_steps} so far)",
            RuntimeWarning,
            stacklevel=5,
        )

    def verify_replicas(self) -> int:
        """Compare the bytes of all parameters over the ranks, frozen ones included; collective.

        Returns:
            How many were compared: 0 without other ranks.

        Raises:
            Disagreement: on all ranks alike, naming the first parameter that differs.
        """
        collectives = self._connect()
        if collectives is None:
            return 0
        params = [param for _, param, _ in self._parameters()]
        names = (parameter_name(self.param_groups, i) for i in range(len(params)))
        facts = [
            (f"bytes of {name}", f"hash {hash_bytes(param):016x}")
            for name, param in zip(names, params, strict=True)
        ]
        agree(collectives, f"{_OP}.verify_replicas", facts, "verify replicas")
        return len(params)

    def close(self) -> None:
        """Remove the hooks, let files go, end the heartbeat; states and parameters stay."""
        self._hooks.remove()
        if self._row_shards is not None:
            self._row_shards.close()
        if self._collectives is not None:
            self._collectives.close()

    def _gradient_arrived(self, param: torch.Tensor) -> None:
        if not self._synchronizing or not self._reduces():
            return
        work = self._prepared(at_step=False)
        position = work.layout.position.get(id(param))
        if position is not None:
            reached("backward hook")
            work.gradients.ready(position)

    def _reduces(self) -> bool:
        collectives = self._connect()
        return self.reduce_gradients and collectives is not None and collectives.world_size > 1

    def _connect(self) -> Collectives | None:
        """The collectives of the group, from the first use on; None without a group."""
        if not self._connected:
            self._connected = True
            group = self.process_group
            if group is None and dist.is_available() and dist.is_initialized():
                group = dist.group.WORLD
            if group is not None:
                self._collectives = Collectives(group, self.first_step_timeout)
        return self._collectives

    def _prepared(self, at_step: bool) -> ShardedStep:
        """The buckets, made anew when the parameters have changed; all ranks come to it alike."""
        work = self._work
        if work is not None:
            begun = work.gradients.begun
            if (begun and not at_step) or work.layout.signature == signature(self.param_groups):
                return work
            if begun:
                work.check_no_new_gradients(self.param_groups)
                return work
        self._hooks.add(param for _, param, _ in self._parameters())
        collectives = self._connect()
        layout = self._shards().layout(self.param_groups)
        states = self._shards().states(self.state, self.param_groups)
        self._work = ShardedStep(_OP, layout, collectives, states, self._options)
        if collectives is not None:
            facts = [*layout_facts(layout, self.param_groups)]
            facts += self._step_facts(self._work, 1.0)
            agree(collectives, _OP, facts, "agree on parameters")
            if collectives.heartbeat is None and collectives.world_size > 1:
                collectives.start_heartbeat()
        return self._work

    def _step_facts(self, work: ShardedStep, scale: float) -> Facts:
        options = ("stage", "reduce_gradients", "max_grad_norm", "skip_nonfinite", "offload")
        more = [(name, repr(getattr(self, name))) for name in options]
        more += [("bucket_mb", str(self._options.capacity / 2**20)), ("grad_scale", repr(scale))]
        hyper = hyper_parameters(self.param_groups, list(self.defaults))
        return step_facts(work.layout, hyper, work.states.counters(), more)

    def empty_state(self, param: torch.Tensor, group: dict[str, Any]) -> State:
        """Return this rank's rows of a state before the first step; see `AdamW`."""
        return self._shards().states(self.state, self.param_groups).empty_state(param)

    def release_memory(self) -> None:
        """Give back memory of states on disk that were looked at; they are read again at need."""
        self._shards().states(self.state, self.param_groups).drop()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, of any world size; see `AdamW`."""
        super().load_state_dict(state_dict)
        self._shards().states(self.state, self.param_groups).absorb()

    def _shards(self) -> RowShards:
        if self._row_shards is None:
            self._row_shards = RowShards(
                _OP, self._connect(), self._offload, self._options.capacity
            )
        return self._row_shards

    def _like(self, param: torch.Tensor) -> torch.Tensor:
        return self._shards().like(param)
