"""A plan as text: its parts in a table, then how it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feinwerk.plan.fit import Fit
from feinwerk.plan.settings import METHODS, Settings
from feinwerk.plan.sizes import show

if TYPE_CHECKING:
    from feinwerk.plan.predict import Plan

_STAGES = {
    0: "stage 0 (all replicated)", 1: "stage 1 (states sharded)",
    2: "stage 2 (states and gradients sharded)", 3: "stage 3 (fully_shard)",
}  # fmt: skip


def title(plan: Plan) -> str:
    """What is planned, in one line."""
    s, model = plan.settings, plan.model
    adapters = f" r={s.r}" if s.adapted else ""
    return (
        f"{model.model_type}, {model.parameters / 1e9:.3g} B parameters: {METHODS[s.method]}"
        f"{adapters}, {plan.trained:,} trained; {s.batch} x {s.seq} tokens a rank, {s.attention}"
        f"{', checkpointing' if s.checkpointing else ''}"
    )


def where(settings: Settings) -> str:
    """Over which ranks, in one line."""
    if settings.world_size == 1:
        return f"one process on {settings.device}"
    ranks = f"rank {settings.rank} of {settings.world_size} on {settings.device}"
    return f"{ranks}, {_STAGES[settings.stage]}"


def rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(part, most, at the peak, note) of every part, then the peak."""
    found = [(p.name, show(p.bytes), show(p.at_peak), p.note) for p in plan.parts]
    return [*found, ("peak", "", show(plan.peak), f"in the {plan.moment}")]


def verdict(plan: Plan, fit: Fit) -> list[str]:
    """How it fits, in sentences."""
    s = plan.settings
    room = f"{show(fit.memory)} less {show(fit.reserve)} in reserve"
    if fit.fits:
        lines = [f"It fits into {room}: {show(fit.spare)} are left."]
    else:
        lines = [f"It does not fit into {room}: {show(-fit.spare)} are missing."]
    lines.append(_largest("batch", fit.batch, f"sequences of {s.seq} tokens"))
    lines.append(_largest("sequence", fit.seq, f"batches of {s.batch}"))
    return lines


def _largest(what: str, value: int, beside: str) -> str:
    if value == 0:
        return f"No {what} fits with {beside}."
    return f"The largest {what} that fits is {value:,}, with {beside}."


def option_rows(fit: Fit) -> list[tuple[str, str, str, str, str]]:
    """(stage, state bits, checkpointing, peak, fits) of every option."""
    return [
        (str(o.stage), str(o.state_bits), "yes" if o.checkpointing else "no", show(o.peak),
         "fits" if o.fits else f"{show(o.peak + fit.reserve - fit.memory)} too much")
        for o in fit.options
    ]  # fmt: skip


OPTION_HEAD = ("stage", "state bits", "checkpointing", "peak", "")
HEAD = ("a rank", "at most", "at the peak", "")


def text_table(plan: Plan) -> str:
    """Return the whole plan as lines of plain text."""
    lines = [title(plan), where(plan.settings), *_aligned((HEAD, *rows(plan)), left=(0, 3))]
    if plan.fit is not None:
        lines += verdict(plan, plan.fit)
        lines += _aligned((OPTION_HEAD, *option_rows(plan.fit)), left=(4,))
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
