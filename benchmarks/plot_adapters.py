"""Draws a training step of one layer with LoRA and DoRA, Feinwerk beside PEFT + bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.bars import find
from benchmarks.plan import PROJECTIONS
from benchmarks.plot import GRID, INK, MUTED, SETTINGS, STYLES, pyplot

OURS, PEER = "feinwerk", "PEFT + bitsandbytes"
COLOURS = {OURS: STYLES["feinwerk"][1], PEER: STYLES["bitsandbytes"][1]}
PANELS = (("LoRA", 512), ("DoRA", 512), ("DoRA", 64))
DTYPE = "bf16"


def bars_of(
    data: dict[str, Any], method: str, M: int, threads: int
) -> list[tuple[str, float, float, float]]:
    """(shape, our milliseconds, the peer's, median ratio) of every layer that was measured."""
    rows = []
    for shape in PROJECTIONS:
        record = find(
            data, f"{method} forward+backward", M, DTYPE, threads=threads, op="lora_linear",
            shape=shape,
        )  # fmt: skip
        if record is not None and PEER in record["peers"]:
            theirs = record["peers"][PEER]
            times = (1e3 * record["ours"]["median"], 1e3 * theirs["median"])
            rows.append((f"{shape[0]} x {shape[1]}", *times, theirs["ratio"]["median"]))
    return rows


def draw(data: dict[str, Any], path: Path, threads: int = 2) -> None:
    """Write the PNG.

    Args:
        data: a results file.
        path: where the image goes.
        threads: which measurements.
    """
    plt = pyplot()

    with plt.rc_context({**SETTINGS, "ytick.color": INK}):  # the layers' names
        figure, axes = plt.subplots(1, len(PANELS), figsize=(10.4, 3.6), sharey=True, dpi=160)
        for axis, (method, M) in zip(axes, PANELS, strict=True):
            rows = bars_of(data, method, M, threads)[::-1]
            axis.set_title(f"{method}, {M} rows", loc="left", fontsize=10.5, fontweight="bold")
            most = max((theirs for _, _, theirs, _ in rows), default=1.0)
            for i, (_, ours, theirs, ratio) in enumerate(rows):
                for offset, who, ms in ((0.19, OURS, ours), (-0.19, PEER, theirs)):
                    axis.barh(i + offset, ms, height=0.34, color=COLOURS[who])
                    label = f"{ms:.3g}" if who == PEER else f"{ms:.3g}   {ratio:.3g}x"
                    weight = "bold" if who == OURS else "normal"
                    axis.text(
                        ms + 0.015 * most, i + offset, label, va="center", fontsize=8,
                        color=COLOURS[who], fontweight=weight,
                    )  # fmt: skip
            axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
            axis.set(xlim=(0, 1.22 * most), xlabel="ms a step")
            axis.grid(axis="x", color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
        machine = data["machine"]
        figure.suptitle(
            "One layer over NF4, forward and all gradients: lower is better",
            x=0.012, y=0.985, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        for x, who, name in ((0.64, OURS, "Feinwerk"), (0.76, PEER, PEER)):
            figure.text(x, 0.935, f"\u25a0 {name}", color=COLOURS[who], fontsize=9)
        figure.text(
            0.012, 0.02,
            f"r = 16, {DTYPE} activations, fp32 adapters, {threads} threads, weights cold. "
            f"{machine['cpu']}, {machine['cores']} cores. Medians of alternating runs.",
            color=MUTED, fontsize=8,
        )  # fmt: skip
        figure.subplots_adjust(left=0.09, right=0.995, top=0.83, bottom=0.2, wspace=0.06)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
