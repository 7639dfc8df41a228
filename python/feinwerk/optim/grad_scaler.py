"""GradScaler: torch's, for an optimizer whose gradients are known after they have been reduced."""

from __future__ import annotations

from typing import Any

import torch

from feinwerk import _checks
from feinwerk.optim.sharded_adamw import ShardedAdamW


class GradScaler(torch.amp.GradScaler):
    """Scale the loss against underflow in fp16; for `ShardedAdamW`, and all other optimizers.

    torch's own looks at `grad` on each rank. There it would find an infinity on one rank and not on
    the others, whose scales would then differ; and nothing at all with stage 2. This one takes the
    word of the optimizer, which all ranks agree on. Use it like `torch.amp.GradScaler`, without
    `unscale_`: `ShardedAdamW(max_grad_norm=...)` clips gradients without their scale.

    Args:
        device: as for all others, see `torch.amp.GradScaler`.
        init_scale: see there.
        growth_factor: see there.
        backoff_factor: see there.
        growth_interval: see there.
        enabled: see there.

    Raises:
        NotImplementedError: in `unscale_` of a ShardedAdamW.

    Source:
        Mixed Precision Training (arXiv 1710.03740), section 3.2.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer, scaler = ShardedAdamW(layer.parameters()), GradScaler("cpu")
        >>> scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide gradients by the scale, of any optimizer but ShardedAdamW.

        Raises:
            NotImplementedError: for ShardedAdamW, whose reduced gradients are not in `grad`.
        """
        if isinstance(optimizer, ShardedAdamW) and self.is_enabled():
            rule = "not be unscaled (it clips by max_grad_norm)"
            _checks.reject(
                NotImplementedError, "GradScaler.unscale_", "optimizer", rule, "ShardedAdamW"
            )
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step, unless a gradient of any rank is not finite; see `torch.amp.GradScaler.step`."""
        if not isinstance(optimizer, ShardedAdamW) or not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        optimizer.tells_grad_scaler = True
        try:
            result = super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.tells_grad_scaler = False
        for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.fill_(float(optimizer.found_inf_anywhere))
        return result

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not isinstance(optimizer, ShardedAdamW):
            checked: dict[str, Any] = super()._check_inf_per_device(optimizer)
            return checked
        scale = self._get_scale_async()
        assert scale is not None
        # To be filled in after the step.
        found: Any = {scale.device: torch.zeros((), dtype=torch.float32, device=scale.device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return dict(found)
