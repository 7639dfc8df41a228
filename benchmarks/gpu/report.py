"""Turns results of GPUs into text: the short table of a run, the page, its plots.

python -m benchmarks.gpu.report                     renders docs/gpu_benchmarks.md and its plots
python -m benchmarks.gpu.report --add DIR/gpu.json  takes a run into benchmarks/results first
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts
from benchmarks.gpu.cases import CASES, COPY, WORKSPACE
from benchmarks.gpu.verdicts import failures, judge, limits_of, passed, rate, verdicts
from benchmarks.report import BEGIN, END
from benchmarks.text import number, table

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu_benchmarks.md"
IMAGES = ROOT / "docs" / "images"
SCHEMA = "gpu-1"
SHORT_CHARACTERS = 9500
# Where all would be too much to print, words give way before results do.
SHORTER = {
    "nf4_linear_backward dX": "dX", "nf4_linear forward": "y", "dense bf16 F.linear": "dense",
    "dequantize, F.linear": "deq+F.linear", "copy bandwidth": "copy", "workspace MB": "MB",
    "bitsandbytes": "bnb", "lora_linear ": "", " not claimed: a check failed": " CHECK FAILED",
    " not claimed: not checked": " unchecked",
}  # fmt: skip


def merged(found: Sequence[tuple[Path, float, list[str]]]) -> dict[str, Any]:
    """One results file out of the parts' files: (path, seconds, notes) of each."""
    from benchmarks.gpu.device import commit

    data: dict[str, Any] = {
        "schema": SCHEMA, "machine": {}, "versions": {}, "limits": {}, "parts": {}, "checks": {},
        "cases": {},
    }  # fmt: skip
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    for path, seconds, notes in found:
        part = parts.load(path) or {"part": path.stem.replace("-", ":", 1), "records": {}}
        data["machine"] = data["machine"] or part.get("machine", {})
        data["versions"] = data["versions"] or part.get("versions", {})
        facts = {"seconds": seconds, "notes": notes, **stamp}
        if part.get("after"):  # nvidia-smi, just after the last case
            facts["after"] = part["after"]
        data["parts"][part["part"]] = facts
        _take(data, part["part"], part["records"])
    return data


def _take(data: dict[str, Any], name: str, records: dict[str, Any]) -> None:
    if name == parts.LIMITS:
        data["limits"] = records.get(parts.LIMITS, {})
        return
    kind = "checks" if name.startswith(parts.CHECKS) else "cases"
    data[kind] |= {key: {**record, "part": name} for key, record in records.items()}


def add(data: dict[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """Results with every part that `data` holds replaced, and the others of `into` kept."""
    result = json.loads(json.dumps(into))
    if result["machine"]["name"] != data["machine"]["name"]:
        raise ValueError(
            f"add: machine must be {result['machine']['name']}, got {data['machine']['name']}"
        )
    for kind in ("checks", "cases"):
        kept = {k: r for k, r in result[kind].items() if r["part"] not in data["parts"]}
        result[kind] = {**kept, **data[kind]}
    result["limits"] = data["limits"] or result["limits"]
    result["parts"] |= data["parts"]
    result["machine"], result["versions"] = data["machine"], data["versions"]
    return dict(result)


def short(data: dict[str, Any]) -> str:
    """The table that a run prints last: a line for each comparison, within SHORT_CHARACTERS."""
    machine, limits = data["machine"], limits_of(data)
    lines = [
        f"{machine.get('gpu', 'no device')}, {versions_line(data)}",
        f"copy {number(limits.get('copy_gbps', 0))} GB/s, "
        f"bf16 matmul {number(limits.get('matmul_tflops', 0))} TFLOP/s",
        "checks passed: " + (", ".join(f"{op} {a}/{b}" for op, (a, b) in passed(data).items())),
    ]
    for op, found in failures(data).items():
        lines.append(f"  {op}: {len(found)} failed, such as {found[0][:300]}")
    full = [*lines, *_short_cases(data, everything=True)]
    if len("\n".join(full)) <= SHORT_CHARACTERS:
        return "\n".join(full)
    text = "\n".join([*lines, *_short_cases(data, everything=False)])
    for name, less in SHORTER.items():
        text = text.replace(name, less)
    return text[:SHORT_CHARACTERS]


def _short_cases(data: dict[str, Any], everything: bool) -> Iterator[str]:
    absent: dict[str, int] = {}
    for case in CASES:
        record = data["cases"].get(case.key)
        if record is None:
            continue
        if "error" in record:
            yield f"{case.key}: failed: {record['error'][:160]}"
            continue
        speed = rate(data, record)
        cells = [f"{case.key}: {number(record['ours']['us'])} us", rate_words(speed)]
        if record.get("workspace_bytes"):
            cells.append(f"{record['workspace_bytes'] / (1 << 20):.0f} MB")
        cells += [record["ours"]["how"]] if record["ours"]["how"] != "graph" else []
        line = [", ".join(cell for cell in cells if cell)]
        for bar in case.bars:
            found = judge(data, case, bar)
            if found.value is None:
                what = f"{bar.against} {found.word}"
                absent[what] = 1 + absent.get(what, 0)
            else:
                line.append(f"{measured(bar.against, found)}, {bar.words} {found.word}")
        barred = {bar.against for bar in case.bars}
        for name, peer in record["peers"].items() if everything else ():
            if name not in barred:
                line.append(f"{name} {number(peer['ratio']['median'])}x")
        yield " | ".join(line)
    for what, count in absent.items():
        yield f"{what} ({count} bars)"


def measured(against: str, verdict: Any) -> str:
    """A bar's measured value as text."""
    if against == COPY:
        return f"{COPY} {100 * verdict.value:.0f} %"
    if against == WORKSPACE:
        return f"{WORKSPACE} {verdict.value:.1f}"
    low, high = verdict.spread
    head = f"{against} {number(verdict.peer_us)} us, {number(verdict.value)}x"
    return f"{head} [{number(low)}, {number(high)}]"


def rate_words(speed: Any) -> str:
    """A rate and its share of the measured limit."""
    if not speed.bound:
        return ""
    value = f"{number(speed.tflops)} TFLOP/s" if speed.bound == "matmul" else ""
    value = value or f"{number(speed.gbps)} GB/s"
    return f"{value} = {100 * speed.share:.0f} %"


def versions_line(data: dict[str, Any]) -> str:
    """Driver and versions."""
    driver = data["machine"].get("nvidia_smi", {}).get("driver_version")
    found = {**({"driver": driver} if driver else {}), **data["versions"]}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def machine_lines(data: dict[str, Any]) -> Iterator[str]:
    """Machine, versions, limits, clocks, dates."""
    machine, limits = data["machine"], data["limits"]
    facts = [f"{machine['gpu']} ({machine['arch']})"]
    if "multiprocessors" in machine:
        facts.append(f"{machine['multiprocessors']} multiprocessors")
        facts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
        facts.append(f"{machine['l2_bytes'] / 1e6:.0f} MB of L2")
    yield f"{', '.join(facts)}; {versions_line(data)}."
    yield ""
    found = limits_of(data)
    if found:
        smi = limits.get("after", {})
        clocks = [f"{k.removeprefix('clocks.')} {v}" for k, v in smi.items() if "clocks" in k]
        line = f"Measured limits: copy {number(found['copy_gbps'])} GB/s (bytes read and written), "
        line += f"bf16 matmul {number(found['matmul_tflops'])} TFLOP/s of random numbers."
        yield line + (f" Clocks: {', '.join(clocks)}." if clocks else "")
        yield ""
    stamps = sorted({(p["date"], p["commit"]) for p in data["parts"].values()})
    yield (
        "Measured: " + "; ".join(f"{date}, commit {commit or '?'}" for date, commit in stamps) + "."
    )


def bar_table(data: dict[str, Any]) -> Iterator[str]:
    """Every bar."""
    rows = []
    for found in verdicts(data):
        record = data["cases"].get(found.case.key, {})
        ours = number(record["ours"]["us"]) if "ours" in record else "-"
        value = "-"
        if found.value is not None:
            value = measured(found.bar.against, found).removeprefix(f"{found.bar.against} ")
            value = value.rpartition("us, ")[2]
        peer = number(found.peer_us) if found.peer_us else ""
        rows.append(
            (found.case.key, found.bar.against, found.bar.words, value, ours, peer, found.word)
        )
    yield from table(("case", "against", "required", "measured", "ours us", "theirs us", ""), rows)


def case_table(data: dict[str, Any]) -> Iterator[str]:
    """Every case that was timed, its rate, and the peers that no bar names."""
    rows = []
    for case in CASES:
        record = data["cases"].get(case.key)
        if record is None or "ours" not in record:
            continue
        speed, ours = rate(data, record), record["ours"]
        barred = {bar.against for bar in case.bars}
        others = [
            f"{name} {number(p['us'])} us, {number(p['ratio']['median'])}x"
            for name, p in record["peers"].items()
            if name not in barred
        ]
        share = f"{100 * speed.share:.0f} % ({speed.bound})" if speed.bound else ""
        spread = f"{number(ours['us'])} ({number(ours['p10'])} to {number(ours['p90'])})"
        rates = number(speed.gbps), number(speed.tflops)
        rows.append((case.key, spread, *rates, share, ours["how"], "; ".join(others)))
    head = ("case", "us (10 to 90 %)", "GB/s", "TFLOP/s", "of the limit", "timed", "beside it")
    yield from table(head, rows)


def check_lines(data: dict[str, Any]) -> Iterator[str]:
    """How many checks of each op passed, and those that did not."""
    rows = [(op, f"{good} of {count}") for op, (good, count) in passed(data).items()]
    yield from table(("op", "checks passed"), rows)
    for op, found in failures(data).items():
        yield ""
        yield f"{op} fails:"
        yield ""
        yield from (f"- {line}" for line in found[:10])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Everything between the markers of the page."""
    if not results:
        return "No GPU has been measured.\n"
    lines: list[str] = []
    for data in results:
        lines += [f"## {data['machine']['gpu']}", "", *machine_lines(data), ""]
        lines += [f"![Share of the measured limit](images/{image(data)})", ""]
        lines += ["### Correctness", "", *check_lines(data), ""]
        lines += ["### Bars", "", *bar_table(data), ""]
        lines += ["### Every case", "", *case_table(data), ""]
    return "\n".join(lines).rstrip() + "\n"


def image(data: dict[str, Any]) -> str:
    """The file name of a GPU's plot."""
    return f"gpu_{data['machine']['name'].replace('-', '_')}.png"


INTRODUCTION = f"""# GPU benchmarks

`make bench-gpu` measures on one GPU what stands here: limits first, then the correctness of every
op, then speed. Times are medians between device events; each call takes another copy of the weight,
and the copies together exceed the L2 cache. *graph*: the calls were replayed from a CUDA graph;
*eager*: queued while the device was kept busy. Ours and its peers take turns, and a ratio such as
*2.5x [2.4, 2.6]* is the median of the rounds' ratios with its 95 % interval: how many times faster
ours is, or for a requirement `<=`, how many times the other's time ours takes. The share of the
limit is that of the measured copy bandwidth or matmul rate, whichever is nearer.
`python -m benchmarks.gpu.report` renders the part below from `benchmarks/results/`.

{BEGIN}
{END}
"""


def render(page: Path, results: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between the markers; make the page if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else INTRODUCTION
    if BEGIN not in text or END not in text:
        raise ValueError(f"render: {page} must hold the markers {BEGIN} and {END}")
    head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{head}{BEGIN}\n\n{markdown(results)}\n{END}{tail}", encoding="utf-8")


def stored(folder: Path) -> list[dict[str, Any]]:
    """Every GPU's results in a folder."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return [data for data in found if data.get("schema") == SCHEMA]


def main(argv: Sequence[str] | None = None) -> None:
    """Render the page and the plots, after taking in a run's file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("--add", type=Path, help="results of a run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(argv)
    if options.add:
        data = json.loads(options.add.read_text(encoding="utf-8"))
        target = options.results / f"{data['machine']['name']}.json"
        before = parts.load(target)
        parts.save(target, data if before is None else add(data, before))
    results = stored(options.results)
    render(options.page, results)
    if results:
        from benchmarks.gpu import plot

        for data in results:
            plot.draw(data, options.images / image(data))


if __name__ == "__main__":
    main()
