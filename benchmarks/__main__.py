"""The one entry to the benchmarks: a process for each configuration, results merged as they come.

make bench                                       everything, under 40 minutes on 2 idle cores
make bench ARGS=--quick                          what the bars on time need, under 8 minutes
make bench OP=nf4_linear SHAPE=4096x4096 ISA=avx2 THREADS=1
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import bench_onnx, counted, machine, optimizer, plan, report
from benchmarks.store import RESULTS, Store

HERE = Path(__file__).resolve().parent
PASS, NOTHING_COLLECTED = 0, 5
# No pytest: a module of that name with records().
COUNTED = ("memory", "adapter_memory", "saved", "quickstart")
# With results and a page of their own.
OPTIMIZER = "optimizer"
ONNX = "onnx"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; OP, SHAPE, ISA and THREADS of the environment are their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    env = os.environ
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_const", const="quick", dest="level", help="bars only"
    )
    level.add_argument(
        "--full", action="store_const", const="full", dest="level", help="every case"
    )
    parser.set_defaults(level="default")
    ops = (*plan.OPS, *COUNTED, OPTIMIZER, ONNX)
    parser.add_argument("--op", default=env.get("OP", ""), help=f"one of {', '.join(ops)}")
    parser.add_argument("--shape", default=env.get("SHAPE", ""), help="one weight, as 4096x4096")
    parser.add_argument("--isa", default=env.get("ISA", ""), help="kernels' instruction set")
    parser.add_argument("--threads", default=env.get("THREADS", ""), help="only this many threads")
    parser.add_argument(
        "--only", default="", help="words a case's name must have, as 'forward M=1 bf16'"
    )
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds a case waits for a quiet machine"
    )
    parser.add_argument("--resume", action="store_true", help="skip what this commit has measured")
    parser.add_argument("--results", type=Path, help="results file, default results/<machine>.json")
    options = parser.parse_args(argv)
    if options.op and options.op not in ops:
        parser.error(f"OP must be one of {', '.join(ops)}, got {options.op!r}")
    parts = options.shape.split("x") if options.shape else []
    if parts and not (len(parts) == 2 and all(part.isdecimal() for part in parts)):
        parser.error(f"SHAPE must be two sizes such as 4096x4096, got {options.shape!r}")
    if options.threads and not options.threads.isdecimal():
        parser.error(f"THREADS must be a positive number, got {options.threads!r}")
    return options


def run_pytest(
    options: argparse.Namespace,
    configuration: plan.Configuration,
    facts: dict[str, object],
    op: str,
) -> int:
    """Measure one op in one configuration, in a fresh process.

    One op: whether a large result gets fresh pages or recycled ones depends on what a process freed
    before, and decides more of the time than some kernels.
    """
    environment = {**os.environ, **configuration.environment()}
    environment["FEINWERK_BENCH_RUN"] = json.dumps(facts)
    for name in ("FEINWERK_ISA", "ONEDNN_MAX_CPU_ISA"):
        if name not in configuration.environment():
            environment.pop(name, None)
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    name = f"{op} {configuration}".replace(" ", "-").replace(",", "")
    raw = machine.BUILD / f"{name}.json"
    flags = ["--level", options.level, "--results", str(options.results)]
    flags += ["--shape", options.shape] if options.shape else []
    flags += ["--patience", str(options.patience)]
    flags += ["--resume"] if options.resume else []
    flags += ["--forced"] if options.isa else []
    flags += ["--only", options.only] if options.only else []
    command = [
        sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"),
        str(HERE / f"bench_{op}.py"), *flags,
        "-s", "-q", "--no-header", "--disable-warnings", "--benchmark-enable", "--benchmark-quiet",
        "--benchmark-disable-gc", "--tb=short",
        f"--benchmark-json={raw}", "-W", "ignore",
    ]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode


def count(
    options: argparse.Namespace, facts: dict[str, object], configuration: plan.Configuration
) -> None:
    """Measure what is counted rather than timed, all of it or the one that was asked for."""
    from feinwerk import backends

    store = Store(options.results, machine.describe())
    run = store.begin(facts)
    for name in (options.op,) if options.op else COUNTED:
        module = importlib.import_module(f"benchmarks.{name}")
        for key, record in module.records(run, configuration, backends.isa() or "reference"):
            store.put(key, record)
            print(f"{key}: measured", flush=True)
    for title, lines in counted.tables(store.data):
        print("\n".join([title, *lines]))


def main(argv: list[str] | None = None) -> int:
    """Run, then print the bars; 0 when every case was measured and correct."""
    options = parse(argv)
    if options.op == OPTIMIZER:
        optimizer.main(["--quick"] if options.level == "quick" else [])
        return PASS
    if options.op == ONNX:
        return bench_onnx.main(["--quick"] if options.level == "quick" else [])
    facts = machine.run_facts()
    options.results = options.results or RESULTS / f"{machine.name()}.json"
    started, worst = time.perf_counter(), 0
    chosen = plan.configurations(options.level, options.isa, options.threads, machine.features())
    print(f"{machine.describe()['cpu']}, {os.cpu_count()} cores; load {facts['load_average']}")
    if options.op not in COUNTED:
        for configuration in chosen:
            for op in (options.op,) if options.op else plan.OPS:
                if not plan.cases(op, options.level, configuration, forced=bool(options.isa)):
                    continue
                status = run_pytest(options, configuration, facts, op)
                worst = max(worst, 0 if status in (PASS, NOTHING_COLLECTED) else status)
    if options.op in COUNTED or (options.level != "quick" and not (options.op or options.shape)):
        count(options, facts, chosen[0])
    if options.results.exists():
        print("\n".join(["", *report.bar_table(Store(options.results).data)]))
    print(f"\n{time.perf_counter() - started:.0f} s; results in {options.results}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
