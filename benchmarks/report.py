"""Turns a results file into text: lines on the terminal, Markdown tables, the bar table, a plot.

python -m benchmarks.report                    prints the bars of this machine
python -m benchmarks.report --docs --plot      renders docs/benchmarks.md and its images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, counted
from benchmarks.machine import QUIET_SHARE
from benchmarks.plan import MAIN_SHAPE, OPS, ROWS, SHAPES
from benchmarks.text import milliseconds, number, table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
SUMMARY = "Turns a results file into tables and a plot."
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
HELD = (("avx512_bf16", "AVX512_CORE_BF16", "bf16"), ("avx2", "", "fp32"))
PEER_ORDER = (
    "dense", "bitsandbytes", "bitsandbytes eval", "ort int4 level 0", "ort int4 level 0 fp16",
    "ort int4 level 4", "ort int4 level 4 block 32", "ort nf4", "NF4Weight.from_dense",
    "torch fill", "NF4 alone", "feinwerk LoRA", "feinwerk, one by one", "PEFT + bitsandbytes",
    "PEFT + bitsandbytes bf16 adapters", "PEFT + bitsandbytes eval",
    "PEFT + bitsandbytes, one by one",
)  # fmt: skip


def ceilings_line(values: dict[str, float]) -> str:
    """What the machine can do, in one line."""
    parts = []
    for key, value in values.items():
        what, _, unit = key.rpartition("_")
        unit = {"gbps": "GB/s", "gops": "GFLOP/s"}[unit]
        parts.append(f"{what.replace('_', ' ')} {number(value)} {unit}")
    return "ceilings: " + ", ".join(parts)


def case_lines(title: str, record: dict[str, Any]) -> str:
    """One case for the terminal: ours, then every peer and limit with its ratio."""
    mine = record["ours"]
    extra = f"{number(record['gbps'])} GB/s"
    if record["gflops"]:
        extra += f", {number(record['gflops'])} GFLOP/s"
    extra += f", {100 * record['share_of_limit']:.0f} % of the limit ({record['bound']})"
    head = f"{milliseconds(mine['median'])} ms (min {milliseconds(mine['min'])})"
    lines = [f"\n{title}", f"  {'feinwerk':<36}{head:<30}{extra}"]
    for name, peer in record["peers"].items():
        time = f"{milliseconds(peer['median'])} ms (min {milliseconds(peer['min'])})"
        note = f"  [{peer['note']}]" if peer["note"] else ""
        lines.append(f"  {name:<36}{time:<30}{faster(peer['ratio'])}{note}")
    for name, limit in record["limits"].items():
        time = f"{milliseconds(limit['median'])} ms"
        lines.append(f"  {'limit: ' + name:<36}{time:<30}{share(limit['share'])}")
    lines += [f"  {name:<36}-  {reason}" for name, reason in record["missing"].items()]
    if record["others_share"] > QUIET_SHARE:
        used = 100 * record["others_share"]
        lines.append(f"  disturbed: other processes used {used:.0f} % of the cores")
    return "\n".join(lines)


def faster(ratio: dict[str, float]) -> str:
    """A ratio with its spread."""
    return (
        f"{number(ratio['median'])}x [{number(ratio['low'])}, {number(ratio['high'])}]"
        f"  10-90 %: {number(ratio['p10'])} to {number(ratio['p90'])}, {ratio['rounds']} rounds"
    )


def share(ratio: dict[str, float]) -> str:
    """A share of a limit with its spread."""
    low, high = 100 * ratio["low"], 100 * ratio["high"]
    return f"{100 * ratio['median']:.0f} % of it [{low:.0f}, {high:.0f}]"


def bar_table(data: dict[str, Any]) -> Iterator[str]:
    """Every bar: required, measured with its 95 % interval, met or not."""
    rows = []
    amx = "amx_bf16" in data["machine"]["features"]
    for verdict in bars.verdicts(data):
        bar, ratio = verdict.bar, verdict.ratio
        if bar.onednn and not amx:
            continue  # what is left without AMX is the machine itself, judged above
        scale, unit = (100, " %") if bar.is_share else (1, "x")
        against = verdict.name or bar.against[0]
        required = f"{'<= ' if bar.at_most else ''}{number(scale * bar.required)}{unit}"
        measured, result = "-", "not measured"
        if ratio is not None:
            low, high = number(scale * ratio["low"]), number(scale * ratio["high"])
            measured = f"{number(scale * ratio['median'])}{unit} [{low}, {high}]"
            result = (
                "met"
                if verdict.met
                else f"missed: {number(ratio['median'] / bar.required, 2)} of it"
            )
            result += " (open)" if verdict.open else ""
        rows.append(
            (
                bar.group, bar.label(), against, required, measured,
                milliseconds(verdict.ours), milliseconds(verdict.theirs), result,
            )
        )  # fmt: skip
    rows += counted.bars(data)
    head = ("bar", "what", "against", "required", "measured", "ours ms", "theirs ms", "result")
    yield from table(head, rows)


def limit_cell(record: dict[str, Any]) -> str:
    """Share of what the machine could do at most, and what that is bound by."""
    return f"{100 * record['share_of_limit']:.0f} % ({record['bound']})"


def peer_cell(record: dict[str, Any], name: str) -> str:
    """A peer's median time and how many times faster we are, empty where it did not run."""
    peer = record["peers"].get(name)
    if peer is None:
        return ""
    return f"{milliseconds(peer['median'])} ms, {number(peer['ratio']['median'])}x"


def matmul_table(
    data: dict[str, Any], shape: Sequence[int], dtype: str, what: str, threads: int, **chosen: Any
) -> Iterator[str]:
    """One weight: a line for each M, ours in ms, then how much faster than each peer."""
    found = []
    for M in ROWS:
        record = bars.find(data, what, M, dtype, shape=shape, threads=threads, **chosen)
        if record is not None:
            found.append(record)
    if not found:
        return
    names = [name for name in PEER_ORDER if any(name in r["peers"] for r in found)]
    rows = []
    for record in found:
        cells = [peer_cell(record, name) for name in names]
        rate = number(record["gbps"]), number(record["gflops"]), limit_cell(record)
        rows.append((str(record["M"]), milliseconds(record["ours"]["median"]), *rate, *cells))
    yield from table(("M", "feinwerk ms", "GB/s", "GFLOP/s", "of the limit", *names), rows)


def other_table(data: dict[str, Any], op: str) -> Iterator[str]:
    """An op that is no matmul: a line for each case."""
    found = [r for r in data["cases"].values() if r["op"] == op]
    if not found:
        return
    names = [name for name in PEER_ORDER if any(name in r["peers"] for r in found)]
    rows = []
    for r in found:
        size = f"{r['N']}x{r['K']}" + (f", {r['M']} rows" if r["M"] else "")
        cells = [peer_cell(r, name) for name in names]
        mine = milliseconds(r["ours"]["median"]), number(r["gbps"]), limit_cell(r)
        rows.append((f"{r['what']} {size}", r["dtype"], str(r["threads"]), *mine, *cells))
    yield from table(
        ("case", "dtype", "threads", "feinwerk ms", "GB/s", "of the limit", *names), rows
    )


def machine_lines(data: dict[str, Any]) -> Iterator[str]:
    """Machine, versions, dates and ceilings."""
    m = data["machine"]
    kind = ", a virtual machine" if m.get("virtual") else ""
    cache = m["last_level_cache_bytes"] / 2**20
    yield f"**{m['cpu']}**, {m['cores']} cores{kind}; {', '.join(m['features'])}; last-level cache"
    yield f"{cache:.0f} MiB as reported; {m['system']}."
    yield ""
    runs = data["runs"].values()
    newest = max(runs, key=lambda run: run["date"])
    yield f"Versions: {', '.join(f'{k} {v}' for k, v in newest['versions'].items())}. Measured"
    yield f"{min(r['date'] for r in runs)[:10]} to {newest['date'][:10]}, commits"
    yield f"{', '.join(sorted({r['commit'] for r in runs}))}."
    configured = {name: c for run in runs for name, c in run["ceilings"].items()}
    keys = sorted({key for c in configured.values() for key in c}, key=lambda k: (k[-4:], k))
    yield ""
    units = {"_gbps": " GB/s", "_gops": " GFLOP/s"}
    names = [key[:-5].replace("_", " ") + units[key[-5:]] for key in keys]
    yield from table(
        ("measured ceiling", *configured),
        (
            (name, *(number(c.get(key, 0.0)) for c in configured.values()))
            for name, key in zip(names, keys, strict=True)
        ),
    )


def markdown(data: dict[str, Any]) -> str:
    """Everything between the markers of docs/benchmarks.md."""
    parts: list[str] = ["## Machine", "", *machine_lines(data), ""]
    parts += ["## Bars", "", *bar_table(data), ""]
    parts += ["![NF4 linear beside its peers](images/nf4_linear.png)", ""]
    parts += ["![Adapters beside PEFT and bitsandbytes](images/adapters.png)", ""]
    sections: list[tuple[str, list[str]]] = []
    for shape in SHAPES:
        for threads in (2, 1):
            for dtype in ("bf16", "fp32", "fp16"):
                for what in ("forward", "int8 forward", "dX"):
                    title = f"{what}, {shape[0]} x {shape[1]}, {dtype}, {threads} thread(s)"
                    lines = list(matmul_table(data, shape, dtype, what, threads))
                    sections.append((title, lines))
    for what in ("forward", "dX"):
        for isa, onednn, dtype in HELD:
            chosen = {"isa": isa, "onednn": onednn}
            title = f"{what}, 4096 x 4096, {dtype}, kernels held to {isa}"
            title += f", oneDNN to {onednn}" if onednn else ""
            sections.append((title, list(matmul_table(data, MAIN_SHAPE, dtype, what, 2, **chosen))))
    for what, dtype in (("forward", "bf16"), ("forward", "fp32"), ("int8 forward", "fp32")):
        title = f"{what}, 4096 x 4096, {dtype}, 2 threads, warm weights"
        sections.append((title, list(matmul_table(data, MAIN_SHAPE, dtype, what, 2, cold=False))))
    explained = "Each peer: its median time, and how many times faster Feinwerk is."
    parts += ["## nf4_linear", "", explained, ""]
    for title, lines in sections:
        if lines:
            parts += [f"### {title}", "", *lines, ""]
    for op in [op for op in OPS if op != "nf4_linear"]:
        lines = list(other_table(data, op))
        if lines:
            parts += [f"## {op}", "", *lines, ""]
    for title, lines in counted.tables(data):
        if lines:
            parts += [f"## {title}", "", *lines, ""]
    return "\n".join(parts).rstrip() + "\n"


INTRODUCTION = """# Benchmarks

`make bench` measures Feinwerk and its peers in turn in one process and keeps the results in
`benchmarks/results/`; `benchmarks/README.md` says how. A figure such as *2.5x [2.4, 2.7]* is the
median of the ratios of neighbouring samples, with a 95 % bootstrap interval; above 1, Feinwerk is
faster. Weights are cold unless a table says otherwise: every call takes another copy, and the
copies together exceed the last-level cache. `python -m benchmarks.report --docs --plot` renders
the part below.

"""


def render(page: Path, data: dict[str, Any]) -> None:
    """Replace what stands between the markers; make the page if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"{INTRODUCTION}{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise ValueError(f"render: {page} must hold the markers {BEGIN} and {END}")
    head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{head}{BEGIN}\n\n{markdown(data)}\n{END}{tail}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=SUMMARY)
    parser.add_argument("--results", type=Path, help="results file; default: this machine's")
    parser.add_argument("--docs", action="store_true", help=f"render {PAGE.relative_to(ROOT)}")
    parser.add_argument("--plot", action="store_true", help=f"draw {IMAGES.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    if options.results is None:
        from benchmarks import machine
        from benchmarks.store import RESULTS

        options.results = RESULTS / f"{machine.name()}.json"
    data = json.loads(options.results.read_text(encoding="utf-8"))
    print("\n".join(bar_table(data)))
    if options.docs:
        render(PAGE, data)
    if options.plot:
        from benchmarks import plot, plot_adapters

        plot.draw(data, IMAGES / "nf4_linear.png")
        plot_adapters.draw(data, IMAGES / "adapters.png")


if __name__ == "__main__":
    main()
