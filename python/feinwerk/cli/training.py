"""The training loop: plain torch, AdamW on the adapters, a pure schedule, resumable at any step."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from feinwerk.cli.answer_loss import answer_nll
from feinwerk.cli.data import Encoded, collate, epoch_batches
from feinwerk.cli.errors import CommandError
from feinwerk.cli.settings import Settings
from feinwerk.optim import AdamW

WARMUP_SHARE = 0.1
FINAL_RATE_SHARE = 0.05
CLIP_NORM = 1.0


@dataclass(frozen=True)
class StepReport:
    """What is known after one step; tokens are real ones, padding is not counted."""

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


class StopRequest:
    """Within this context the first Ctrl-C (or SIGTERM) asks to stop; the second one interrupts."""

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the signals; outside the main thread Python does not allow it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step (from 0): linear warm-up, then a cosine down to 5 %."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """The adapters (fp32 in a model of any dtype), the optimizer and the place in the data."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Encoded],
        settings: Settings,
        steps: int,
        stock: bool = False,
    ) -> None:
        """Start before step 0; `load_state_dict` goes elsewhere. `stock` takes torch's AdamW."""
        self.model = model
        self.examples = examples
        self.settings = settings
        self.steps = steps
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.tokens: list[int] = []
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._adapters = [parameter for _, parameter in named]
        options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": 0.0}
        self._optimizer: torch.optim.Optimizer
        self._clips = not stock
        if stock:
            self._optimizer = torch.optim.AdamW(self._adapters, fused=True, **options)
        else:
            self._optimizer = AdamW(
                self._adapters, state_bits=settings.state_bits, max_grad_norm=CLIP_NORM, **options
            )
        self._lengths = [item.length for item in examples]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self._adapters)

    def batch(self, step: int) -> list[Encoded]:
        """Return the examples of a step: they depend on seed and step only."""
        size = self.settings.batch_size
        epoch, index = divmod(step, -(-len(self.examples) // size))
        if self._epoch[0] != epoch:
            batches = epoch_batches(self._lengths, size, self.settings.seed, epoch)
            self._epoch = (epoch, batches)
        return [self.examples[i] for i in self._epoch[1][index]]

    def run(
        self,
        *,
        on_step: Callable[[StepReport], None],
        save: Callable[[], object],
        stop: StopRequest,
    ) -> bool:
        """Train to the last step.

        Args:
            on_step: told about every step.
            save: called every `checkpoint_every` steps, at a stop and at the end.
            stop: looked at after every step.

        Returns:
            Whether the last step was reached; False after a stop request.

        Raises:
            CommandError: if the loss is not finite.
        """
        self.model.train()
        while self.step < self.steps and not stop.requested:
            on_step(self.one_step())
            if self.step % self.settings.checkpoint_every == 0 and self.step < self.steps:
                save()
        save()
        return self.step == self.steps

    def one_step(self) -> StepReport:
        """Train one step; its `seconds` are those of the trainer since step 0."""
        started = time.perf_counter()
        items = self.batch(self.step)
        batch = collate(items, pad=0)
        loss = answer_nll(self.model, batch).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise CommandError(
                f"quickstart: the loss is not finite at step {self.step + 1}; "
                f"try a lower --learning-rate"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        rate = learning_rate(self.step, self.steps, self.settings.learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if not self._clips:
            torch.nn.utils.clip_grad_norm_(self._adapters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(value)
        self.tokens.append(sum(item.length for item in items))
        self.seconds += time.perf_counter() - started
        return StepReport(self.step, self.steps, value, self.tokens[-1], self.seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, and the curve so far."""
        return {
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "tokens": list(self.tokens),
            "adapters": {n: p.detach() for n, p in zip(self._names, self._adapters, strict=True)},
            "optimizer": self._optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            CommandError: if the adapters are not the ones of the checkpoint.
        """
        self.load_adapters(state["adapters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps = int(state["step"]), int(state["steps"])
        self.seconds = float(state["seconds"])
        self.losses, self.tokens = list(state["losses"]), list(state["tokens"])
        torch.set_rng_state(state["torch_rng"])

    def load_adapters(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over the values of adapters of the same names and shapes.

        Raises:
            CommandError: if they are not.
        """
        shapes = {n: tuple(p.shape) for n, p in zip(self._names, self._adapters, strict=True)}
        if {name: tuple(tensor.shape) for name, tensor in saved.items()} != shapes:
            raise CommandError("quickstart: the checkpoint's adapters must be those of this model")
        with torch.no_grad():
            for name, adapter in zip(self._names, self._adapters, strict=True):
                adapter.copy_(saved[name])
