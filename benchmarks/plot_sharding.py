"""Draws the simulation: memory a rank, and the share of a step that is waiting, by ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plot import GRID, INK, MUTED, SETTINGS, pyplot, spread_labels
from benchmarks.report import IMAGES
from benchmarks.report_sharding import find

# (method, stage): label, colour, width. One colour a method, darker where more is sharded.
LINES = {
    ("full", 1): ("full, stage 1", "#9cc4dd", 1.5),
    ("full", 2): ("full, stage 2", "#3a7ca5", 1.5),
    ("full", 3): ("full, stage 3", "#1d4560", 1.8),
    ("lora", 2): ("LoRA, stage 2", "#e0a030", 1.5),
    ("qdora", 2): ("QDoRA, stage 2", "#eb8a98", 2.0),
    ("qdora", 3): ("QDoRA, stage 3", "#d1495b", 2.6),
}
MODELS = {"llama-2-7b": "7 B parameters", "llama-2-70b": "70 B parameters"}
DEVICE_GB = 80
MIN_GAP = 0.075
FLOOR = 0.05  # % of a step


def series(data: dict[str, Any], model: str, method: str, stage: int, bits: int) -> list[Any]:
    """The cases of one line, by ranks."""
    sizes = sorted({case["world_size"] for case in data["cases"]})
    chosen = {"model": model, "method": method, "stage": stage, "state_bits": bits}
    return [find(data, **chosen, world_size=N) for N in sizes]


def share(case: dict[str, Any], network: str) -> float:
    """Percent of the step that is waiting."""
    timing = case["timing"][network]
    return max(FLOOR, 100 * timing["exposed"] / (timing["compute"] + timing["exposed"]))


def draw(data: dict[str, Any], path: Path | None = None) -> None:
    """Write the PNG.

    Args:
        data: the simulation's results.
        path: where the image goes; default docs/images/sharding.png.
    """
    plt = pyplot()
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(2, 2, figsize=(10.4, 8.0), dpi=160, sharex=True, sharey="row")
        for column, (model, title) in enumerate(MODELS.items()):
            memory, waiting = axes[0][column], axes[1][column]
            memory.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
            for key, (_, colour, width) in LINES.items():
                _memory_lines(memory, data, model, key, colour, width)
                _waiting_lines(waiting, data, model, key, colour, width)
            memory.axhline(DEVICE_GB, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
            memory.text(
                1024, DEVICE_GB * 1.06, "an 80 GB device", color=MUTED, fontsize=8, ha="right"
            )
        for axis, ticks, unit in (
            *((axis, (2, 5, 10, 20, 50, 100, 200, 500), "GB") for axis in axes[0]),
            *((axis, (0.1, 1, 10, 50, 100), "%") for axis in axes[1]),
        ):
            axis.set(xscale="log", yscale="log", xlim=(0.9, 9000))
            axis.yaxis.set_major_locator(FixedLocator(ticks))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _, u=unit: f"{v:g} {u}"))
            axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(axis="y", color=GRID, linewidth=0.8)
            axis.tick_params(length=0)
            axis.tick_params(axis="x", labelbottom=True)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
        for axis in axes[0]:
            axis.set_ylim(2, 1500)
        for axis in axes[1]:
            axis.set_ylim(FLOOR, 130)
            axis.set_xlabel("ranks, 8 a node")
        figure.canvas.draw()
        for column, model in enumerate(MODELS):
            _label(axes[0][column], {
                key: series(data, model, *key, 8)[-1]["memory"]["peak"] / 1e9 for key in LINES
            })  # fmt: skip
            _label(axes[1][column], {
                key: share(series(data, model, *key, 8)[-1], "InfiniBand") for key in LINES
            })  # fmt: skip
        _texts(figure)
        figure.subplots_adjust(
            left=0.065, right=0.995, top=0.855, bottom=0.105, wspace=0.05, hspace=0.42
        )
        target = path or IMAGES / "sharding.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)
        plt.close(figure)


def _memory_lines(
    axis: Any, data: dict[str, Any], model: str, key: tuple[str, int], colour: str, width: float
) -> None:
    for bits in (32, 8):
        cases = series(data, model, *key, bits)
        if bits == 32 and key[0] != "full":
            continue  # adapters' states are too small to show
        axis.plot(
            [case["world_size"] for case in cases],
            [case["memory"]["peak"] / 1e9 for case in cases],
            color=colour, linewidth=width if bits == 8 else 1.0,
            linestyle="-" if bits == 8 else (0, (4, 2)), solid_capstyle="round", zorder=3 + width,
        )  # fmt: skip


def _waiting_lines(
    axis: Any, data: dict[str, Any], model: str, key: tuple[str, int], colour: str, width: float
) -> None:
    if key == ("full", 1):
        return  # stage 2 sends the same
    for network in ("Ethernet", "InfiniBand"):
        cases = [case for case in series(data, model, *key, 8) if case["world_size"] > 1]
        axis.plot(
            [case["world_size"] for case in cases], [share(case, network) for case in cases],
            color=colour, linewidth=width if network == "InfiniBand" else 1.0,
            linestyle="-" if network == "InfiniBand" else (0, (1, 1.6)),
            solid_capstyle="round", zorder=3 + width,
        )  # fmt: skip


def _label(axis: Any, ends: dict[tuple[str, int], float]) -> None:
    """Write each line's name at its right end, apart from each other."""
    waiting = axis.get_ylim()[0] == FLOOR
    keys = [key for key in ends if not (waiting and key == ("full", 1))]
    to_axes = axis.transData + axis.transAxes.inverted()
    places = {str(key): to_axes.transform((1024, ends[key]))[1] for key in keys}
    # Half way between pushed up and pushed down: names stay around their lines.
    up = spread_labels(places, MIN_GAP)
    down = spread_labels({key: -place for key, place in places.items()}, MIN_GAP)
    heights = {key: (up[key] - down[key]) / 2 for key in places}
    x = to_axes.transform((1024, 10))[0] + 0.015
    for key in keys:
        label, colour, width = LINES[key]
        if waiting and key == ("full", 2):
            label = "full, stages 1, 2"
        weight = "bold" if width > 2.5 else "normal"
        axis.text(
            x, heights[str(key)], label, transform=axis.transAxes, color=colour, fontsize=8.5,
            va="center", fontweight=weight,
        )  # fmt: skip


def _texts(figure: Any) -> None:
    figure.suptitle(
        "Fine-tuning on more ranks: what each rank holds, and how long it waits",
        x=0.012, y=0.985, ha="left", fontsize=13, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.text(
        0.012, 0.915, "Memory of a rank.  Solid: 8-bit moments, dashed: 32-bit.",
        color=MUTED, fontsize=9.5,
    )  # fmt: skip
    figure.text(
        0.012, 0.477, "Share of a step that waits for transfers.  Solid: InfiniBand between "
        "nodes, dotted: Ethernet.", color=MUTED, fontsize=9.5,
    )  # fmt: skip
    figure.text(
        0.012, 0.018,
        "A simulation: bytes by the shipped shard arithmetic, modelled links, 4,096 tokens a rank "
        "and step, checkpointing. Assumptions in docs/guides/plan.md. All axes logarithmic.",
        color=MUTED, fontsize=8,
    )  # fmt: skip
