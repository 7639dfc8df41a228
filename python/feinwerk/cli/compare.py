"""Stock PEFT beside the fused path: the same steps in turn, and peak memory in fresh processes.

```
   same base weights, same initial adapters, same batches
   step 1: ours, theirs    step 2: theirs, ours    step 3: ours, theirs  ...   one ratio a step
```
For methods over NF4, stock PEFT runs over bitsandbytes' Linear4bit with the same bytes; for the
others over the dense model. `python -m feinwerk.cli.compare ours < settings.json` prints what one
side needs.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from feinwerk.cli import data, machine, model
from feinwerk.cli.console import Display
from feinwerk.cli.errors import CommandError
from feinwerk.cli.settings import Settings
from feinwerk.cli.training import Trainer

WARM_UP, PAIRS = 2, 12
MEMORY_STEPS = 3
RESAMPLES = 2000
SIDES = ("ours", "theirs")


@dataclass(frozen=True)
class Side:
    """One side's steps; memory is the process's, before its first training step and at most."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    resident: int
    peak: int

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Ratio:
    """Their seconds over ours, step by step: median, its 95 % interval, 10 and 90 %."""

    median: float
    low: float
    high: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Comparison:
    """What `--compare` measured."""

    peer: str
    ours: Side
    theirs: Side
    ratio: Ratio

    @property
    def loss_difference(self) -> float:
        """The largest relative difference between the losses of the same step."""
        pairs = zip(self.ours.losses, self.theirs.losses, strict=True)
        return max(abs(mine - other) / other for mine, other in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, medians and difference included."""
        return {
            **asdict(self),
            "seconds_per_step": {"ours": self.ours.step, "theirs": self.theirs.step},
            "loss_difference": self.loss_difference,
        }

    def sentences(self) -> list[str]:
        """Time and memory in a sentence each."""
        ratio, mib = self.ratio, 2**20
        return [
            f"a training step takes {self.ours.step:.3g} s, with {self.peer} "
            f"{self.theirs.step:.3g} s: {ratio.median:.2f}x as fast (95 % interval "
            f"{ratio.low:.2f} to {ratio.high:.2f})",
            f"peak memory while training {self.ours.peak / mib:,.0f} MiB, with {self.peer} "
            f"{self.theirs.peak / mib:,.0f} MiB",
        ]


def peer_name(settings: Settings) -> str:
    """What stands on the other side."""
    return "stock PEFT + bitsandbytes" if settings.quantized else "stock PEFT, dense weights"


def run(trained: Trainer, settings: Settings, source: model.Source, display: Display) -> Comparison:
    """Measure both sides.

    Args:
        trained: whose model and examples are used; its adapters start again from the beginning.
        settings: of the run.
        source: of the model, which is loaded once more for the other side.
        display: shows the phases.

    Raises:
        CommandError: if a process that measures memory fails.
    """
    peer = peer_name(settings)
    with display.phase(f"preparing {peer}"):
        stock = adapted_model(settings, source, fused=False)
    steps = max(trained.steps, WARM_UP + PAIRS)
    ours = Trainer(trained.model, trained.examples, settings, steps)
    theirs = Trainer(stock, trained.examples, settings, steps, stock=True)
    ours.load_adapters(theirs.state_dict()["adapters"])
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with display.phase(f"training in turn with {peer}", total=WARM_UP + PAIRS) as bar:
        for pair in range(WARM_UP + PAIRS):
            both = {"ours": ours, "theirs": theirs}
            for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
                seconds[side].append(timed_step(both[side]))
            spent = [seconds[side][-1] for side in SIDES]
            bar.update(pair + 1, f"{spent[0]:.3g} s, {spent[1]:.3g} s")
    del stock
    with display.phase("peak memory, each side in a process of its own", total=2) as bar:
        memory = {}
        for side in SIDES:
            memory[side] = measured_alone(side, settings)
            bar.advance()
    kept = {side: tuple(values[WARM_UP:]) for side, values in seconds.items()}
    return Comparison(
        peer,
        Side(kept["ours"], tuple(ours.losses[WARM_UP:]), **memory["ours"]),
        Side(kept["theirs"], tuple(theirs.losses[WARM_UP:]), **memory["theirs"]),
        paired_ratio(kept["ours"], kept["theirs"], settings.seed),
    )


def timed_step(trainer: Trainer) -> float:
    """Train one step; its seconds."""
    started = time.perf_counter()
    trainer.model.train()
    trainer.one_step()
    return time.perf_counter() - started


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int) -> Ratio:
    """Return the median of theirs[i] / ours[i] with its 95 % bootstrap interval."""
    pairs = np.array(theirs) / np.array(ours)
    drawn = np.random.default_rng(seed).integers(0, len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(pairs[drawn], axis=1), [2.5, 97.5])
    p10, p90 = np.percentile(pairs, [10, 90])
    return Ratio(float(np.median(pairs)), float(low), float(high), float(p10), float(p90))


def adapted_model(settings: Settings, source: model.Source, *, fused: bool) -> Any:
    """Load the model and attach fresh adapters, fused or stock."""
    base, _ = model.load_model(source, cache=settings.cache)
    model.hold(base, settings, lambda *_: None)
    if settings.quantized and not fused:
        to_bitsandbytes(base)
    return model.attach_adapters(base, settings, source, fused=fused)


def to_bitsandbytes(base: torch.nn.Module) -> None:
    """Turn every NF4Linear into bitsandbytes' Linear4bit over the same bytes, in place."""
    bnb: Any = importlib.import_module("bitsandbytes")
    for name, layer in model.decoder_linears(base):
        state = layer.state_dict()
        packed, bias = state.pop("weight"), state.pop("bias", None)
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=bias is not None,
            compute_dtype=layer.dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit.from_prequantized(
            packed, state, requires_grad=False, device="cpu", module=new
        )
        if bias is not None:
            new.bias = torch.nn.Parameter(bias, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, new)
    base.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks a quantized model


def measured_alone(side: str, settings: Settings) -> dict[str, int]:
    """Train a few steps of one side in a fresh process; its resident and peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "feinwerk.cli.compare", side],
        input=json.dumps(settings.to_dict()), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"quickstart: --compare could not measure memory ({side}): {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(side: str, settings: Settings) -> dict[str, int]:
    """Train on the widest of the compared batches and return resident and peak memory."""
    torch.set_num_threads(settings.threads or machine.available_cores())
    model.quiet_libraries()
    source = model.find_model(settings.model)
    base, tokenizer = model.load_model(source, cache=settings.cache)
    del base
    examples, _ = data.split(data.load_dataset(settings.dataset).examples, settings.held_out)
    encoded = data.encode(tokenizer, examples, settings.max_length)
    adapted = adapted_model(settings, source, fused=side == "ours").train()
    trainer = Trainer(adapted, encoded, settings, WARM_UP + PAIRS, stock=side != "ours")
    widths = [max(e.length for e in trainer.batch(step)) for step in range(WARM_UP + PAIRS)]
    widest = widths.index(max(widths))
    gc.collect()
    machine.return_free_memory()
    machine.reset_peak_memory()
    resident = machine.resident_memory()
    for _ in range(MEMORY_STEPS):
        trainer.step = widest
        trainer.one_step()
    return {"resident": resident, "peak": machine.peak_memory()}


if __name__ == "__main__":
    print(json.dumps(memory_of(sys.argv[1], Settings(**json.load(sys.stdin)))))
