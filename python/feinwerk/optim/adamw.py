"""AdamW with 8-bit, bf16 or fp32 states: a plain torch.optim.Optimizer over `adamw_step`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from feinwerk import _checks
from feinwerk.optim.device_norm import Norm
from feinwerk.optim.gradient_norm import first_nonfinite, local_gradient, reduced_square_sum
from feinwerk.optim.group import (
    DTYPE_RULE,
    PARAM_DTYPES,
    check_group,
    check_max_grad_norm,
    parameter_name,
)
from feinwerk.optim.load_state import check_layout, loaded_state
from feinwerk.optim.state import (
    State,
    StepItem,
    first_element,
    is_dtensor,
    is_quantized,
    is_row_sharded,
    new_state,
    step_parameters,
    to_local,
    wrap_state,
)

_KEPT = (
    "max_grad_norm",
    "skip_nonfinite",
    "skipped_steps",
    "nonfinite_parameter",
)


class AdamW(Optimizer):
    """AdamW whose moments take about 2 bytes a parameter instead of 8.

        g = grad * min(1, max_grad_norm / norm)
        m = m + (g - m) (1 - beta1)
        v = v beta2 + g^2 (1 - beta2)
        p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    A drop-in for `torch.optim.AdamW`: parameter groups, schedulers, closures, tensor lr and
    `torch.amp.GradScaler` work as there. With `state_bits=32` it is the same up to rounding. The
    step itself is `feinwerk.adamw_step`: one pass over the memory.

    `state[p]` holds plain tensors: `step` (0-dim fp32 on the CPU) and, for a matrix of at least
    `min_quantized_numel` elements, for each moment `exp_avg`, `exp_avg_sq`:

        <moment>_codes   uint8, the parameter's shape
        <moment>_absmax  fp32 [rows, ceil(row / blocksize)], rows = shape[0]

    otherwise the moments themselves; and for bf16 parameters `param_remainder`, uint8 [*shape, 2],
    the bytes of an int16 that `(parameter's bits << 16) + remainder` makes the fp32 master of. A
    block never crosses a row, so that states sharded by rows (FSDP2) are the same bits as whole
    ones. For a DTensor parameter they are DTensors placed as it is; Shard(0) and Replicate for
    8-bit states and stochastic rounding, any sharding else.

    Every parameter of a group may be given as `(name, parameter)`; messages use the names then.

    Args:
        params: parameters, named parameters or groups; fp32 or bf16, dense.
        lr: learning rate, a number or a tensor with one element.
        betas: decays of the two moments, in [0, 1).
        eps: above 0.
        weight_decay: decoupled, at least 0.
        state_bits: 8, 16 (bf16 moments) or 32.
        blocksize: elements of a row per absmax.
        bf16_params: "remainder" keeps, at 2 more bytes, an exact fp32 master of which the parameter
            is the upper half; "stochastic" rounds each update at random by (seed, step, index of
            the parameter, index of the element), the same on every rank.
        min_quantized_numel: matrices with fewer elements keep fp32 moments.
        layout: "rows": vectors keep fp32 moments; "flat": everything is quantized, a vector as one
            row (for engines that hand over flat partitions).
        max_grad_norm: bound of the norm of all gradients; they are scaled inside the step, not
            rewritten. None: no clipping.
        skip_nonfinite: leave out the whole step if a gradient has a NaN or an infinity.
        maximize: ascend instead of descend.
        seed: for stochastic rounding.

    Attributes:
        last_grad_norm: norm of the gradients of the last step, before clipping, without the
            scaler's factor; None unless `max_grad_norm` or `skip_nonfinite` is set.
        skipped_steps: how many steps `skip_nonfinite` has left out.
        nonfinite_parameter: the first bad parameter of the last step left out.

    Raises:
        TypeError: if a parameter with gradients is neither fp32 nor bf16.
        ValueError: if an option breaks its rule.
        NotImplementedError: in `step`, for sparse gradients and for DTensors that are placed in
            another way.

    Source:
        Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2; 8-bit Optimizers
        via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> layer = torch.nn.Linear(512, 512)
        >>> optimizer = AdamW(layer.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> layer(torch.ones(1, 512)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg_codes"].dtype
        torch.uint8
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 8,
        blocksize: int = 256,
        bf16_params: str = "remainder",
        min_quantized_numel: int = 4096,
        layout: str = "rows",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the parameters; states come with the first step. See the class."""
        check_max_grad_norm(type(self).__name__, max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._norm: Norm | float | None = None
        self.skipped_steps = 0
        self.nonfinite_parameter: str | None = None
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "blocksize": blocksize,
            "bf16_params": bf16_params,
            "min_quantized_numel": min_quantized_numel,
            "layout": layout,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept, "_norm": self.last_grad_norm}

    @property
    def last_grad_norm(self) -> float | None:
        """See the class; on a GPU, this waits for the step's gradients."""
        return self._norm.value() if isinstance(self._norm, Norm) else self._norm

    @last_grad_norm.setter
    def last_grad_norm(self, norm: float | None) -> None:
        self._norm = norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer`.

        Raises:
            TypeError: as the class does; the group is not added then.
            ValueError: likewise.
        """
        super().add_param_group(param_group)
        try:
            check_group(type(self).__name__, self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Over DTensors with `max_grad_norm` or `skip_nonfinite` it is a collective call.

        Args:
            closure: computes the loss and the gradients anew; called first.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: if a parameter with a gradient is neither fp32 nor bf16.
            NotImplementedError: as the class does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        with torch.no_grad():
            self._step(grad_scale)
        return loss

    def _step(self, grad_scale: torch.Tensor | None) -> None:
        everything = [found for found in self._parameters() if found[1].grad is not None]
        for index, param, _ in everything:
            self._check_gradient(index, param)
        clip_coef = None
        if self.max_grad_norm is not None or self.skip_nonfinite:
            params = [param for _, param, _ in self._parameters()]
            self._norm = Norm(reduced_square_sum(params), grad_scale)
            if self.skip_nonfinite and not math.isfinite(self._norm.value()):
                self._skip(params, self._norm.value())
                return
            if self.max_grad_norm is not None:
                clip_coef = self._norm.clip_coefficient(self.max_grad_norm)
        items: dict[int, list[StepItem]] = {}
        for index, param, group_index in everything:
            item = self._item(index, param, self.param_groups[group_index])
            items.setdefault(group_index, []).append(item)
        for group_index, members in items.items():
            group = self.param_groups[group_index]
            step_parameters(members, group, clip_coef=clip_coef, grad_scale=grad_scale)
        for _, param, _ in everything:
            # Their local tensors have counted the change, they themselves have not.
            if is_dtensor(param):
                torch.autograd.graph.increment_version(param)

    def _parameters(self) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Index over all groups, parameter, index of its group."""
        index = 0
        for group_index, group in enumerate(self.param_groups):
            for param in group["params"]:
                yield index, param, group_index
                index += 1

    def _check_gradient(self, index: int, param: torch.Tensor) -> None:
        """Refuse before anything is changed, and on every rank of a collective step alike."""
        if param.grad is None:
            return
        op, name = type(self).__name__, parameter_name
        if param.dtype not in PARAM_DTYPES:
            where = name(self.param_groups, index)
            _checks.reject(TypeError, op, where, DTYPE_RULE, param.dtype)
        if param.grad.layout is not torch.strided:
            where = f"gradient of {name(self.param_groups, index)}"
            _checks.reject(NotImplementedError, op, where, "be dense", param.grad.layout)

    def empty_state(self, param: torch.Tensor, group: dict[str, Any]) -> State:
        """Return what a parameter has before its first step, to read a saved state into.

        Args:
            param: of this optimizer.
            group: its group.

        Returns:
            New tensors, placed as the parameter's states are; `state` is as before.
        """
        fresh = new_state(to_local(param), param.shape, group)
        if is_dtensor(param):
            mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
            fresh = wrap_state(fresh, mesh, placements, param.shape)
        return fresh

    def release_memory(self) -> None:
        """Give back memory of states that are in files as well; for who has read many of them."""

    def _item(self, index: int, param: torch.Tensor, group: dict[str, Any]) -> StepItem:
        grad = local_gradient(param)
        assert grad is not None
        local = to_local(param)
        first = self._first_element(index, param, group) if is_dtensor(param) else 0
        state = self.state[param]
        if not state:
            state.update(self.empty_state(param, group))
        return StepItem(local, grad, state, index, first)

    def _like(self, param: torch.Tensor) -> torch.Tensor:
        """What a parameter's states are placed like."""
        return param

    def _first_element(self, index: int, param: torch.Tensor, group: dict[str, Any]) -> int:
        vector_codes = param.dim() < 2 and group["state_bits"] == 8 and group["layout"] == "flat"
        if is_row_sharded(param) and not vector_codes:
            return first_element(param)
        stochastic = param.dtype is torch.bfloat16 and group["bf16_params"] == "stochastic"
        if is_quantized(param.shape, group) or stochastic:
            where = parameter_name(self.param_groups, index)
            what = "stochastic rounding" if stochastic else "8-bit states"
            rule = f"be a matrix placed by Shard(0) and Replicate() for {what}"
            got = f"shape {tuple(param.shape)}, {param.placements}"  # type: ignore[attr-defined]
            _checks.reject(NotImplementedError, type(self).__name__, where, rule, got)
        return 0

    def _skip(self, params: list[torch.Tensor], norm: float) -> None:
        index = first_nonfinite(params)
        self.skipped_steps += 1
        self.nonfinite_parameter = (
            None if index is None else parameter_name(self.param_groups, index)
        )
        warnings.warn(
            f"{type(self).__name__}: gradients must be finite, got norm {norm} with the first bad "
            f"one in {self.nonfinite_parameter}; step left out ({self.skipped_steps} so far)",
            RuntimeWarning,
            stacklevel=5,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; tensors are copied and keep their dtypes.

        A DTensor parameter takes a DTensor placed as it is, or the whole tensor and cuts it.

        Args:
            state_dict: of an optimizer with the same groups and the same layout options
                (`state_bits`, `blocksize`, `layout`, `min_quantized_numel`, `bf16_params`). Other
                options are taken from it, as torch does. `torch.optim.AdamW`'s fits
                `state_bits=32` with fp32 parameters.

        Raises:
            TypeError: if a tensor has another dtype.
            ValueError: if an option or a shape differs, or a tensor is missing or not expected.
                Nothing has been changed then.
        """
        op = type(self).__name__
        states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        others: dict[Any, Any] = {}

        # Hooks around the base's own work, so that it sees no tensor it would cast, while the
        # user's hooks before and after see what they always see.
        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved = state_dict["param_groups"]
            if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
                return state_dict  # the base says what is wrong
            check_layout(op, self.param_groups, saved)
            keys = [key for group in saved for key in group["params"]]
            place = dict(zip(keys, self._parameters(), strict=True))
            for key, value in state_dict["state"].items():
                if key not in place:
                    others[key] = value
                    continue
                index, param, group_index = place[key]
                name = parameter_name(self.param_groups, index)
                group = self.param_groups[group_index]
                states[param] = loaded_state(op, name, self._like(param), value, group)
            return {**state_dict, "state": {}}

        def put(_: Optimizer) -> None:
            self.state.update(states)
            self.state.update(others)
            for group in self.param_groups:
                for name, default in self.defaults.items():
                    group.setdefault(name, default)

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
