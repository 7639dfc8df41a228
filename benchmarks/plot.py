"""Draws the README's plot: NF4 matmul time against rows, Feinwerk beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.bars import find
from benchmarks.plan import MAIN_SHAPE, ROWS

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GRID,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
}  # fmt: skip
# name: (label, colour, line width, marker). Ours stands out; dense is the yardstick.
STYLES = {
    "feinwerk": ("Feinwerk", "#d1495b", 2.8, "o"),
    "dense": ("dense bf16", "#30343f", 1.5, "s"),
    "bitsandbytes": ("bitsandbytes", "#3a7ca5", 1.5, "^"),
    "bitsandbytes eval": ("bitsandbytes eval", "#7fb3d5", 1.5, "v"),
    "ort int4 level 0": ("ONNX Runtime int4", "#e0a030", 1.5, "D"),
}
PANELS = (("forward", "Forward, $y = xW^T$"), ("dX", "Input gradient, $dX = dY\\,W$"))
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MIN_LABEL_GAP = 0.062  # of the axis height, so that the labels at the right do not touch


def series(data: dict[str, Any], what: str, threads: int) -> dict[str, list[tuple[int, float]]]:
    """Median milliseconds by M, for ours and every styled peer that was measured."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for M in ROWS:
        record = find(data, what, M, "bf16", threads=threads)
        if record is None:
            continue
        times = {"feinwerk": record["ours"], **record["peers"]}
        for name in STYLES:
            if name in times:
                lines.setdefault(name, []).append((M, 1e3 * times[name]["median"]))
    return lines


def spread_labels(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The same heights moved apart until neighbours are `gap` from each other."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(height, last + gap)
        placed[name] = last
    return placed


def pyplot() -> Any:
    """Matplotlib's pyplot, for files alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw(data: dict[str, Any], path: Path, threads: int = 2) -> None:
    """Write the PNG.

    Args:
        data: a results file.
        path: where the image goes.
        threads: which measurements.
    """
    plt = pyplot()
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(
            1, 2, figsize=(10.4, 4.6), sharey=True, dpi=160, width_ratios=(1.25, 1)
        )
        for axis, (what, title) in zip(axes, PANELS, strict=True):
            lines = series(data, what, threads)
            axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=8)
            axis.set(xscale="log", yscale="log", xlabel="rows of x (M)")
            rows = [M for M in ROWS if min(p[0][0] for p in lines.values()) <= M]
            axis.set_xlim(0.85 * rows[0], ROWS[-1] * (ROWS[-1] / rows[0]) ** 0.34)
            axis.set_xticks(rows, [str(M) for M in rows])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(FixedLocator(TICKS))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g} ms"))
            axis.grid(axis="y", color=GRID, linewidth=0.8)
            axis.tick_params(length=0)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
            for name, points in reversed(lines.items()):
                label, colour, width, marker = STYLES[name]
                ours = name == "feinwerk"
                axis.plot(
                    *zip(*points, strict=True), color=colour, linewidth=width, marker=marker,
                    markersize=5.5 if ours else 4, zorder=5 if ours else 3, label=label,
                    solid_capstyle="round", markeredgecolor="white", markeredgewidth=0.6,
                )  # fmt: skip
        figure.canvas.draw()
        for axis, (what, _) in zip(axes, PANELS, strict=True):
            label_ends(axis, series(data, what, threads))
        machine = data["machine"]
        kind = "virtual machine" if machine.get("virtual") else "machine"
        tiles = " with AMX" if "amx_bf16" in machine["features"] else ""
        rows, columns = MAIN_SHAPE
        figure.suptitle(
            f"A {rows} x {columns} layer held in 4 bits: time per call, lower is better",
            x=0.012, y=0.985, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        figure.text(
            0.012, 0.015,
            f"bf16 activations, {threads} threads, weights cold. {machine['cpu']}{tiles}, "
            f"{machine['cores']}-core {kind}. Medians of alternating runs; both axes logarithmic.",
            color=MUTED, fontsize=8,
        )  # fmt: skip
        figure.subplots_adjust(left=0.065, right=0.995, top=0.84, bottom=0.15, wspace=0.04)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def label_ends(axis: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Write each line's name at its last point instead of a legend."""
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = {name: to_axes.transform(points[-1]) for name, points in lines.items()}
    heights = spread_labels({name: y for name, (_, y) in ends.items()}, MIN_LABEL_GAP)
    for name, (x, _) in ends.items():
        label, colour, *_ = STYLES[name]
        weight = "bold" if name == "feinwerk" else "normal"
        axis.text(
            x + 0.022, heights[name], label, transform=axis.transAxes, color=colour,
            fontsize=9, va="center", fontweight=weight,
        )  # fmt: skip
