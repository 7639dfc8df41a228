"""Renders the simulation's tables into docs/guides/plan.md, from the results file alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import BEGIN, END, ROOT
from benchmarks.text import number, table

PAGE = ROOT / "docs" / "guides" / "plan.md"
SHOWN = (1, 8, 64, 1024)
NAMES = {"llama-2-7b": "7 B", "llama-2-70b": "70 B"}
METHODS = {"full": "full, bf16", "lora": "LoRA", "qlora": "QLoRA", "qdora": "QDoRA"}
GB = 1e9


def find(data: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The one case with these fields."""
    (found,) = [
        case for case in data["cases"] if all(case[name] == value for name, value in wanted.items())
    ]
    return dict(found)


def zero_table(data: dict[str, Any]) -> Iterator[str]:
    """ZeRO's table: GB of model states for 7.5 B parameters."""
    rows = [(N, *map(_as_printed, sizes)) for N, sizes in data["zero"].items()]
    yield from table(("ranks", "replicated", "stage 1", "stage 2", "stage 3"), rows)


def _as_printed(size: float) -> str:
    """GB with the digits of the paper; halves are rounded up."""
    digits = 0 if size >= 99.95 * GB else 1 if size > 4 * GB else 2
    return f"{size / GB + 1e-6:.{digits}f}"


def memory_table(data: dict[str, Any]) -> Iterator[str]:
    """GB a rank by method, stage and ranks, with 8-bit and 32-bit moments."""
    head = ["model", "method", "stage", *(f"{N} rank{'s' * (N > 1)}" for N in SHOWN)]
    rows = []
    for model, name in NAMES.items():
        for method, label in METHODS.items():
            for stage in (1, 2, 3):
                cells = []
                for N in SHOWN:
                    sizes = [
                        find(data, model=model, method=method, stage=stage, state_bits=bits,
                             world_size=N)["memory"]["peak"]
                        for bits in (8, 32)
                    ]  # fmt: skip
                    cells.append(" / ".join(number(size / GB) for size in sizes))
                rows.append((name, label, str(stage), *cells))
    yield from table(head, rows)


def exposed_table(data: dict[str, Any]) -> Iterator[str]:
    """Exposed communication, share of the step, InfiniBand / Ethernet between nodes."""
    networks = [network["name"] for network in data["networks"]]
    many = [N for N in SHOWN if N > 1]
    head = ["model", "method", "stage", "computation", *(f"{N} ranks" for N in many)]
    rows = []
    for model, name in NAMES.items():
        for method, label in METHODS.items():
            for stage in (1, 3):
                chosen = {"model": model, "method": method, "stage": stage, "state_bits": 8}
                cells = []
                for N in many:
                    times = find(data, **chosen, world_size=N)["timing"]
                    shares = [_share(times[network]) for network in networks]
                    cells.append(" / ".join(f"{share:.0f} %" for share in shares))
                compute = find(data, **chosen, world_size=many[0])["timing"][networks[0]]["compute"]
                stages = "1, 2" if stage == 1 else "3"
                rows.append((name, label, stages, f"{1e3 * compute:,.0f} ms", *cells))
    yield from table(head, rows)


def _share(timing: dict[str, float]) -> float:
    return 100 * timing["exposed"] / (timing["compute"] + timing["exposed"])


def padding_lines(data: dict[str, Any]) -> Iterator[str]:
    """What the padding of few rows costs: sent by a rank, beside 2 P (N - 1) / N elements."""
    rows = []
    for N in (8, 64, 1024):
        cells = []
        for method in ("full", "lora"):
            case = find(
                data, model="llama-2-7b", method=method, stage=2, state_bits=8, world_size=N
            )
            cells.append(f"{case['timing']['InfiniBand']['sent'] / GB:.2f} GB")
        rows.append((f"{N}", *cells))
    yield from table(("ranks", "full", "LoRA, r = 16"), rows)


def markdown(data: dict[str, Any]) -> str:
    """Everything between the markers."""
    parts = [f"- {line}" for line in data["assumptions"]]
    parts += ["", "![Memory and waiting by number of ranks](../images/sharding.png)", ""]
    parts += ["### Memory", ""]
    parts += ["GB of rank 0 with 8-bit / 32-bit moments, at the peak of a step.", ""]
    parts += [*memory_table(data), ""]
    parts += ["### Exposed communication", ""]
    parts += ["Share of the step that is waiting, with InfiniBand / Ethernet between nodes.", ""]
    parts += [*exposed_table(data), ""]
    parts += ["### Sent by a rank", "", "Of 7 B in a step with stage 1 or 2, padding included.", ""]
    parts += [*padding_lines(data), ""]
    parts += ["### ZeRO's table", ""]
    parts += ["7.5 B parameters, 12 bytes of states each as in the paper's figure 1, in GB.", ""]
    parts += [*zero_table(data)]
    return "\n".join(parts)


def render(data: dict[str, Any], page: Path = PAGE) -> None:
    """Replace what stands between the markers of the page.

    Raises:
        ValueError: if there are none.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"render: {page} must hold the markers {BEGIN} and {END}")
    head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    page.write_text(f"{head}{BEGIN}\n\n{markdown(data)}\n\n{END}{tail}", encoding="utf-8")
