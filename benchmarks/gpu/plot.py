"""Draws how near each case comes to the GPU's measured limit, from its results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.verdicts import doubt, limits_of, rate
from benchmarks.plot import GRID, INK, MUTED, SETTINGS, pyplot
from benchmarks.text import number

COLOURS = {"memory": "#3a7ca5", "matmul": "#d1495b"}
NAMES = {"memory": "share of the copy bandwidth", "matmul": "share of the bf16 matmul rate"}


def shares(data: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(case, share, what bounds it, microseconds) of what was timed and is claimed."""
    found = []
    for case in CASES:
        record = data["cases"].get(case.key)
        if record is None or "ours" not in record or doubt(data, case):
            continue
        speed = rate(data, record)
        if speed.bound:
            found.append((case.key, speed.share, speed.bound, record["ours"]["us"]))
    return found


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the PNG.

    Args:
        data: a results file.
        path: where the image goes.
    """
    plt = pyplot()
    rows = shares(data)[::-1]
    limits = limits_of(data)
    with plt.rc_context(SETTINGS):
        figure, axis = plt.subplots(figsize=(10.4, 1.5 + 0.24 * max(len(rows), 1)), dpi=160)
        for y, (_, share, bound, us) in enumerate(rows):
            axis.barh(y, 100 * share, color=COLOURS[bound], height=0.68, zorder=3)
            axis.text(
                100 * share + 0.8, y, f"{100 * share:.0f} %   {number(us)} us", va="center",
                fontsize=7.5, color=MUTED,
            )  # fmt: skip
        axis.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8, color=INK)
        axis.set_xlim(0, 118)
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_xticks(range(0, 101, 20), [f"{n} %" for n in range(0, 101, 20)])
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.tick_params(length=0)
        for side in ("top", "right", "left", "bottom"):
            axis.spines[side].set_visible(False)
        for bound, colour in COLOURS.items():
            axis.barh(-9, 0, color=colour, label=NAMES[bound])
        axis.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5,
            borderaxespad=0.2,
        )  # fmt: skip
        height = figure.get_size_inches()[1]
        figure.suptitle(
            f"Share of the measured limit on one {data['machine']['gpu']}",
            x=0.012, y=1 - 0.12 / height, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        figure.text(
            0.012, 0.12 / height,
            f"Limits: copy {number(limits.get('copy_gbps', 0))} GB/s, bf16 matmul "
            f"{number(limits.get('matmul_tflops', 0))} TFLOP/s. Medians, weights beyond L2.",
            color=MUTED, fontsize=8,
        )  # fmt: skip
        figure.subplots_adjust(left=0.36, right=0.99, top=1 - 0.75 / height, bottom=0.55 / height)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
