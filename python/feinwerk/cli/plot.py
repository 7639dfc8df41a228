"""Draws the loss curve with the held-out loss before and after, and time and memory beside PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from feinwerk.cli.compare import Comparison

INK = "#1f2933"
FAINT = "#9aa5b1"
TRAIN = "#2f6f8f"
HELD_OUT = "#c8553d"


def running_mean(values: Sequence[float], half_life: float) -> list[float]:
    """Return the exponential running mean, corrected for its start.

    Args:
        values: one value a step.
        half_life: steps after which a value counts half.
    """
    keep = 0.5 ** (1.0 / half_life)
    total = weight = 0.0
    means: list[float] = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def draw_loss_curve(
    path: Path,
    losses: Sequence[float],
    before: float,
    after: float,
    *,
    title: str,
    subtitle: str,
) -> None:
    """Write the loss curve as a PNG.

    Args:
        path: where to write it.
        losses: training loss of each step, nats per token.
        before: held-out loss without adapter.
        after: held-out loss with adapter.
        title: what was learned.
        subtitle: model, data and machine in one line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(losses) + 1)
    last = max(len(losses), 1)
    figure, axes = plt.subplots(figsize=(8.4, 4.9), dpi=160)
    figure.subplots_adjust(left=0.085, right=0.82, top=0.82, bottom=0.13)
    axes.plot(steps, losses, color=TRAIN, alpha=0.30, linewidth=1.0)
    smooth = running_mean(losses, half_life=max(2.0, len(losses) / 20))
    axes.plot(steps, smooth, color=TRAIN, linewidth=2.4, solid_capstyle="round")
    axes.plot([0, last], [before] * 2, color=HELD_OUT, linewidth=1.1, linestyle=(0, (2, 3)))
    arrow = {"arrowstyle": "-|>", "color": HELD_OUT, "linewidth": 1.1, "shrinkB": 5}
    axes.annotate("", (last, after), (last, before), arrowprops=arrow, annotation_clip=False)
    axes.plot(
        [0, last], [before, after], "o", color=HELD_OUT, markersize=7, clip_on=False, zorder=5
    )

    axes.annotate(
        f"held-out before  {before:.3f}", (last, before), (-8, 5), textcoords="offset points",
        color=HELD_OUT, fontsize=10, va="bottom", ha="right",
    )  # fmt: skip
    gap = 0.09 * (max([*losses, before]) - min([*losses, after]))
    train_y, held_y = _apart(smooth[-1] if smooth else after, after, gap)
    axes.annotate(
        f"training (mean)\n{smooth[-1] if smooth else math.nan:.3f}", (last, train_y), (12, 0),
        textcoords="offset points", color=TRAIN, fontsize=10, va="center", annotation_clip=False,
    )  # fmt: skip
    axes.annotate(
        f"held-out after\n{after:.3f}  ({100 * (after / before - 1):+.1f} %)", (last, held_y),
        (12, 0), textcoords="offset points", color=HELD_OUT, fontsize=10, va="center",
        annotation_clip=False,
    )  # fmt: skip

    axes.set_xlim(0, last)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("optimizer step", color=INK, fontsize=10)
    axes.set_ylabel("loss (nats per answer token)", color=INK, fontsize=10)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    figure.text(0.085, 0.925, title, color=INK, fontsize=13.5, fontweight="bold")
    figure.text(0.085, 0.87, subtitle, color="#616e7c", fontsize=9.5)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def draw_comparison(path: Path, result: Comparison, method: str) -> None:
    """Write two pairs of bars as a PNG: median time per step, and peak memory.

    Args:
        path: where to write it.
        result: what was measured.
        method: its name, for the title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sides, colours = (result.ours, result.theirs), (HELD_OUT, FAINT)
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.7), dpi=160)
    figure.subplots_adjust(left=0.235, right=0.95, top=0.66, bottom=0.06, wspace=0.18)
    panels = (
        ("training step, median", [side.step for side in sides], "{:.3g} s"),
        ("peak memory while training", [side.peak / 2**20 for side in sides], "{:,.0f} MiB"),
    )
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        axis.barh([1, 0], values, height=0.62, color=colours)
        for y, value in zip((1, 0), values, strict=True):
            axis.text(
                0.02 * max(values), y, form.format(value), va="center", color="white",
                fontsize=10.5, fontweight="bold",
            )  # fmt: skip
        axis.set_title(title, loc="left", color="#616e7c", fontsize=9.5)
        axis.set_yticks([1, 0], ["Feinwerk", result.peer], color=INK, fontsize=10)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[1].set_yticks([])
    saved = 1 - result.ours.peak / result.theirs.peak
    memory = f"{100 * abs(saved):.0f} % {'less' if saved >= 0 else 'more'} memory"
    figure.text(
        0.012, 0.9, f"{method}: a training step {result.ratio.median:.1f}x as fast, {memory}",
        color=INK, fontsize=13.5, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _apart(first: float, second: float, gap: float) -> tuple[float, float]:
    """Move two label heights apart so that the two-line labels do not touch."""
    needed = 1.6 * gap
    if abs(first - second) >= needed:
        return first, second
    middle = (first + second) / 2
    sign = 1.0 if first >= second else -1.0
    return middle + sign * needed / 2, middle - sign * needed / 2
