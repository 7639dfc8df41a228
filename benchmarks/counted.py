"""Bars and tables of what is counted in bytes, and of the quickstart's training step end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.text import milliseconds, number, table

MEMORY_SLACK = 1 << 20  # stacks, the allocator's own pages
MATMUL_WHO = ("feinwerk", "dense", "bitsandbytes")
PEFT = "PEFT + bitsandbytes"
NORM = "norm over NF4"
DORA_MEMORY = 1.05  # of LoRA's
SAVED_MB = {"QLoRA": 180, "QDoRA": 210, "QDoRA, dropout 0.05": 215}  # whole MB, 10^6 bytes
FASTER = {"qlora": 1.5, "qdora": 2.5}  # a training step of the quickstart


def mib(value: float) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:.1f} MiB"


def met(holds: bool) -> str:
    """The last column of a bar."""
    return "met" if holds else "missed"


def found(data: dict[str, Any], op: str) -> list[dict[str, Any]]:
    """The records of one kind."""
    return [record for record in data["cases"].values() if record["op"] == op]


def bars(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows for the table of bars: group, what, against, required, measured, two times, result."""
    for record in found(data, "memory"):
        yield matmul_bar(record)
    for record in found(data, "adapter_memory"):
        yield adapter_bar(record)
    for method, most in SAVED_MB.items():
        for record in found(data, "saved"):
            if record["what"] == method:
                used, theirs = (record["bytes"][who] / 1e6 for who in ("feinwerk", PEFT))
                yield (
                    "Saved for backward", f"SmolLM2-135M, {record['M']} tokens, {method}",
                    f"{PEFT}: {theirs:.1f} MB", f"<= {most} MB", f"{used:.1f} MB", "", "",
                    met(round(used) <= most),
                )  # fmt: skip
    for record in found(data, "quickstart"):
        yield from quickstart_bars(record)


def matmul_bar(record: dict[str, Any]) -> tuple[str, ...]:
    """Peak extra memory of one matmul against the workspace it may use."""
    used, bound = record["extra_bytes"]["feinwerk"], record["workspace_bytes"] + MEMORY_SLACK
    return (
        "Peak extra memory", f"M={record['M']} {record['dtype']} {record['what']}",
        "the workspace", f"<= {mib(bound)}", mib(used), "", "",
        met(used <= bound < record["dense_bytes"]),
    )  # fmt: skip


def adapter_bar(record: dict[str, Any]) -> tuple[str, ...]:
    """DoRA's step against LoRA's; the norm against one fp32 matrix of N x r."""
    used = record["bytes"]["feinwerk DoRA"]
    if record["what"] == NORM:
        bound = record["N"] * record["rank"] * 4 + MEMORY_SLACK
        return (
            "Peak memory", f"{record['N']}x{record['K']} {record['what']}",
            "N x r", f"<= {mib(bound)}", mib(used), "", "", met(used <= bound),
        )  # fmt: skip
    lora = record["bytes"]["feinwerk LoRA"]
    return (
        "Peak memory", f"M={record['M']} {record['dtype']} DoRA {record['what']}",
        "feinwerk LoRA", f"<= {DORA_MEMORY}x", f"{number(used / lora)}x", "", "",
        met(used <= DORA_MEMORY * lora),
    )  # fmt: skip


def quickstart_bars(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A training step end to end, and the peak memory of training."""
    method, ratio = record["what"], record["ratio"]
    label = f"SmolLM2-135M, {method}, {record['dtype']}"
    low, high = number(ratio["low"]), number(ratio["high"])
    yield (
        "Quickstart, a training step", label, record["against"], f"{FASTER[method]}x",
        f"{number(ratio['median'])}x [{low}, {high}]", milliseconds(record["ours"]),
        milliseconds(record["theirs"]), met(ratio["median"] >= FASTER[method]),
    )  # fmt: skip
    ours, theirs = record["bytes"]["feinwerk"], record["bytes"][record["against"]]
    yield (
        "Quickstart, peak memory", label, record["against"], f"< {mib(theirs)}", mib(ours), "", "",
        met(ours < theirs),
    )  # fmt: skip


def tables(data: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of every table; no lines where nothing was measured."""
    yield "Peak extra memory", list(matmul_table(data))
    yield "Peak memory of a step with adapters", list(bytes_table(data, "adapter_memory", 2**20))
    yield "Saved for the backward of one step", list(bytes_table(data, "saved", 1e6))
    yield "The quickstart's training step", list(quickstart_table(data))


def matmul_table(data: dict[str, Any]) -> Iterator[str]:
    """Peak memory beyond inputs and output, of one call."""
    rows = [
        (
            f"{r['what']} {r['N']}x{r['K']}, M={r['M']}", r["dtype"],
            *(f"{r['extra_bytes'][who] / 2**20:.1f}" for who in MATMUL_WHO),
            f"{r['workspace_bytes'] / 2**20:.1f}", f"{r['dense_bytes'] / 2**20:.1f}",
        )
        for r in found(data, "memory")
    ]  # fmt: skip
    if rows:
        head = ("call", "dtype", "feinwerk MiB", "dense MiB", "bitsandbytes MiB",
                "feinwerk's workspace MiB", "dense copy of W MiB")  # fmt: skip
        yield from table(head, rows)


def quickstart_table(data: dict[str, Any]) -> Iterator[str]:
    """End to end: time of a step, and the process's peak memory while training."""
    rows = []
    for r in found(data, "quickstart"):
        peaks = (r["bytes"][who] for who in ("feinwerk", r["against"]))
        rows.append(
            (
                r["what"], r["dtype"], milliseconds(r["ours"]), milliseconds(r["theirs"]),
                f"{number(r['ratio']['median'])}x", *(f"{peak / 2**20:.0f}" for peak in peaks),
            )
        )  # fmt: skip
    if rows:
        head = ("method", "dtype", "feinwerk ms", "stock ms", "faster", "feinwerk MiB", "stock MiB")
        yield from table(head, rows)


def bytes_table(data: dict[str, Any], op: str, unit: float) -> Iterator[str]:
    """A line for each case, a column for each candidate."""
    records = found(data, op)
    names = list(dict.fromkeys(who for record in records for who in record["bytes"]))
    rows = []
    for r in records:
        size = f" {r['N']}x{r['K']}, M={r['M']} {r['dtype']}" if "N" in r else ""
        cells = [f"{r['bytes'][who] / unit:.1f}" if who in r["bytes"] else "" for who in names]
        rows.append((f"{r['what']}{size}", *cells))
    if rows:
        suffix = "MB" if unit == 1e6 else "MiB"
        yield from table(("case", *(f"{name} {suffix}" for name in names)), rows)
