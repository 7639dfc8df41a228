"""The one command: limits, correctness of every op, then speed; each part in a process of its own.

python -m benchmarks.gpu --out DIR                      everything, normally under 5 minutes
python -m benchmarks.gpu --out DIR --only limits,decode some parts
python -m benchmarks.gpu --out DIR --device cpu --dry   every line at tiny sizes, without a GPU

Writes DIR/<gpu>.json after every part and prints a short table last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts, report

BUDGET_SECONDS = 450.0
STARTS = 3  # of a part, when it dies or its context is lost
POLL_SECONDS = 0.2
LOG_CHARACTERS = 60_000  # kept of each part's output
DRY_FACTOR = 4  # what a part may take longer in Triton's interpreter
LEAST_SECONDS = 8.0  # below this no process is started any more


@dataclass
class Child:
    """A part's process, started again where it died."""

    name: str
    path: Path
    options: list[str]
    environment: dict[str, str]
    begin: float = 0.0
    deadline: float = 0.0
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    notes: list[str] = field(default_factory=list)

    def start(self, deadline: float) -> None:
        """Start the process; it goes on behind the records that are there."""
        self.begin = self.begin or time.monotonic()
        self.deadline = deadline
        self.starts += 1
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", self.name]
        command += ["--file", str(self.path), *self.options]
        with self.path.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )

    def finished(self) -> bool:
        """Whether nothing is left to wait for; starts a process that died again."""
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            if time.monotonic() < self.deadline:
                return False
            self.process.kill()
            self.process.wait()
            self._blame("out of time")
            return True
        data = parts.load(self.path)
        if data is not None and data["done"]:
            return True
        if status != parts.LOST:
            self._blame(f"the process ended with status {status}: {self._last_line()}")
        left = self.deadline - time.monotonic()
        if self.starts < STARTS and left > LEAST_SECONDS and data is not None:
            self.start(self.deadline)
            return False
        self.notes.append("not finished")
        return True

    def _blame(self, reason: str) -> None:
        """Give the record that was running the reason as its error."""
        data = parts.load(self.path)
        self.notes.append(reason)
        if data is None or "running" not in data:
            return
        data["records"][data.pop("running")] = {"error": reason}
        parts.save(self.path, data)

    def _last_line(self) -> str:
        log = self.path.with_suffix(".log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1][:200] if lines else ""

    def seconds(self) -> float:
        """Since its first start."""
        return time.monotonic() - self.begin


def environment(jobs: int) -> dict[str, str]:
    """The processes' environment: this checkout, and the cores divided among `jobs`."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::RuntimeWarning",
    }


def chosen(only: str) -> list[str]:
    """The parts that `only` names, by their whole name or the part behind the colon or before."""
    everything = parts.names()
    if not only:
        return everything
    wanted = only.split(",")
    words = {n: {n, *n.replace("-", ":").split(":"), n.partition(":")[2]} for n in everything}
    found = [n for n in everything if words[n] & set(wanted)]
    unknown = [w for w in wanted if not any(w in known for known in words.values())]
    if unknown:
        raise SystemExit(f"--only: must name parts, got {', '.join(unknown)}; {everything}")
    return found


def collect(children: Sequence[Child], out: Path) -> dict[str, Any]:
    """Merge all parts' files, write the result, and return it."""
    data = report.merged([(child.path, child.seconds(), child.notes) for child in children])
    if data["machine"]:
        parts.save(out / f"{data['machine']['name']}.json", data)
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for child in children:
            text = child.path.with_suffix(".log")
            if text.exists() and text.stat().st_size:
                log.write(
                    f"==== {child.name}\n{text.read_text(errors='replace')[-LOG_CHARACTERS:]}\n"
                )
    return data


def wait(children: Sequence[Child], done: list[Child], out: Path) -> None:
    """Wait for processes that run side by side; say so and write the results as each ends."""
    waiting = list(children)
    while waiting:
        for child in [c for c in waiting if c.finished()]:
            waiting.remove(child)
            done.append(child)
            data = parts.load(child.path) or {"records": {}}
            records = data["records"].values()
            failed = sum("error" in record for record in records)
            notes = f", {'; '.join(child.notes)}" if child.notes else ""
            print(
                f"{child.name:<16}{child.seconds():6.1f} s  {len(records)} records, "
                f"{failed} failed{notes}",
                flush=True,
            )
            collect(done, out)
        time.sleep(POLL_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or be one of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"), help="a folder")
    parser.add_argument("--only", default="", help="parts, by commas: limits,check,speed,decode")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="for everything")
    parser.add_argument("--jobs", type=int, default=0, help="checks side by side; default: cores")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.dry:
        parser.error("--device: cpu must come with --dry")
    if options.part:
        from benchmarks.gpu.device import Device

        return parts.run(options.part, Device(options.device, options.dry), options.file)
    begin = time.monotonic()
    end = begin + options.seconds
    handed = ["--device", options.device, *(["--dry"] if options.dry else [])]
    done: list[Child] = []
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or max(1, min(len(parts.names()), os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        wanted = chosen(options.only)
        checks = [name for name in wanted if name.startswith(parts.CHECKS)]
        batches = [[name] for name in wanted if name not in checks]
        at = 1 if wanted[:1] == [parts.LIMITS] else 0
        batches[at:at] = [checks[i : i + jobs] for i in range(0, len(checks), jobs)]
        for batch in batches:
            left = end - time.monotonic()
            children = [
                Child(
                    name, Path(folder) / f"{name.replace(':', '-')}.json", handed,
                    environment(len(batch)),
                )
                for name in batch
            ]  # fmt: skip
            if left < LEAST_SECONDS:
                for child in children:
                    child.notes.append("no time was left")
                    child.begin = time.monotonic()
                    print(f"{child.name:<16}  left out: no time", flush=True)
                done += children
                continue
            for child in children:
                allowed = parts.TIMEOUTS[child.name.partition(":")[0]]
                allowed *= DRY_FACTOR if options.dry else 1
                child.start(time.monotonic() + min(allowed, left))
            wait(children, done, options.out)
        data = collect(done, options.out)
    print(f"all parts {time.monotonic() - begin:.1f} s; results in {options.out}\n", flush=True)
    print(report.short(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
