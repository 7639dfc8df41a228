"""AdamW as DeepSpeed's client optimizer: 8-bit states over the flat partitions of ZeRO."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from feinwerk import _checks, optim
from feinwerk.optim.group import LAYOUT_OPTIONS
from feinwerk.optim.moments import quantize_moment
from feinwerk.optim.state import MOMENTS, StepItem, is_quantized


class AdamW(optim.AdamW):
    """`feinwerk.optim.AdamW` for `deepspeed.initialize`: every state is quantized.

    ZeRO replaces the parameters of a group by one flat fp32 vector, this rank's partition (stage
    3: one for each sub-group), whose length no blocksize divides. Blocks run over that vector and
    the last one is short; there is no fall-back to fp32. So with `state_bits=8` a rank keeps
    2 + 8 / blocksize bytes for each element of its partition.

        optimizer = feinwerk.integrations.deepspeed.AdamW(model.parameters(), lr=1e-4)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=complete_config(config)
        )

    DeepSpeed clips (`gradient_clipping`) and skips steps (`fp16`): this class does neither, since
    one rank sees a part of the gradients only. A checkpoint of DeepSpeed's is resumed bit for bit
    at the same world size; for another one see `to_universal`: universal checkpoints hold fp32
    moments, which the first step after loading one quantizes anew, with a warning.

    Args:
        params: as given to `feinwerk.optim.AdamW`, but with one width for all groups; names are
            dropped, partitions have none.
        lr: learning rate, a number or a tensor with one element.
        betas: decays of the two moments, in [0, 1).
        eps: above 0.
        weight_decay: decoupled, at least 0.
        state_bits: 8, 16 (bf16 moments) or 32.
        blocksize: elements of the partition per absmax.
        maximize: ascend instead of descend.

    Raises:
        TypeError: if a parameter with gradients is neither fp32 nor bf16.
        ValueError: if an option breaks its rule; in `step`, if a universal checkpoint has brought
            moments without a step.

    Source:
        ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv 1910.02054);
        8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> partition = torch.nn.Parameter(torch.ones(1000))
        >>> optimizer = AdamW([partition], lr=1e-3)
        >>> partition.grad = torch.ones(1000)
        >>> optimizer.step()
        >>> optimizer.state[partition]["exp_avg_absmax"].shape
        torch.Size([1, 4])
    """

    _has_warned = False

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
        maximize: bool = False,
    ) -> None:
        """Take the parameters; states come with the first step. See the class."""
        super().__init__(
            params, lr, betas, eps, weight_decay,
            state_bits=state_bits, blocksize=blocksize, layout="flat", maximize=maximize,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer`.

        Raises:
            TypeError: as the class does; the group is not added then.
            ValueError: likewise, and for a `state_bits`, `blocksize` or layout of its own.
        """
        for name in LAYOUT_OPTIONS:
            value = param_group.get(name, self.defaults[name])
            if value != self.defaults[name]:
                rule = f"be {self.defaults[name]!r} in all groups"
                _checks.reject(ValueError, "AdamW", name, rule, repr(value))
        params = param_group["params"]
        if not isinstance(params, torch.Tensor):
            # The names would stay behind when ZeRO puts one vector in the parameters' place.
            bare = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
            param_group = {**param_group, "params": bare}
        super().add_param_group(param_group)

    # Not step(): a class above that has been stepped itself would run its hooks a second time.
    def _item(self, index: int, param: torch.Tensor, group: dict[str, Any]) -> StepItem:
        state = self.state.get(param)
        if state:
            # A universal checkpoint may bring the options of the optimizer that wrote it.
            group.update({name: self.defaults[name] for name in LAYOUT_OPTIONS})
            if "step" not in state:
                got = f"{', '.join(map(str, state))} alone"
                rule = "have a step (is step.pt in the universal checkpoint?)"
                _checks.reject(ValueError, "AdamW", "state of a partition", rule, got)
            # Stage 3 gives one and the same tensor to all sub-groups: each would count for all.
            step = torch.as_tensor(state["step"], dtype=torch.float32)
            state["step"] = step.detach().to("cpu", copy=True).reshape(())
            if MOMENTS[0] in state and is_quantized(param.shape, group):
                self._quantize_all()
        return super()._item(index, param, group)

    def _quantize_all(self) -> None:
        """Quantize the moments that DeepSpeed has put in place from a universal checkpoint.

        Those of all groups: after the first one has been stepped, DeepSpeed keeps references to
        what it finds in the states of all.
        """
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "AdamW: the moments of a universal checkpoint are fp32; they are quantized to 8 "
                "bits, anew if they have been 8-bit before: not bit for bit what was saved",
                stacklevel=3,
            )
        for state in self.state.values():
            for name in MOMENTS:
                if name in state:
                    moment = state.pop(name)
                    codes, absmax = quantize_moment(name, moment, self.defaults["blocksize"])
                    state[f"{name}_codes"], state[f"{name}_absmax"] = codes, absmax
