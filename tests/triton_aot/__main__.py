"""The ahead-of-time gate: compiles every kernel for real GPUs where there is none.

python -m tests.triton_aot [--full] [--write] [--op OP] [--one-in N] [--processes N] [--verbose]
"""

from __future__ import annotations

import argparse
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.triton_aot", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every input for every target")
    parser.add_argument("--write", action="store_true", help="write the record (with --full)")
    parser.add_argument("--op", help="the inputs of one op only; no record is compared")
    parser.add_argument("--one-in", type=int, default=1, help="of each kernel's variants")
    parser.add_argument("--verbose", action="store_true", help="also the longest compilations")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("nothing is compiled under TRITON_INTERPRET=1: unset it")
        return 2

    import triton

    from tests.triton_aot import gate

    gate.cache()
    start = time.perf_counter()
    full = options.full or options.write
    count = 1 if options.write else options.one_in
    outcome = gate.run(full, options.op, options.processes, count)
    print(f"{gate.summary(outcome)}; {time.perf_counter() - start:.0f} s in all")
    for seconds, where in outcome.times[: 5 if options.verbose else 0]:
        print(f"{seconds:5.1f} s {where}")
    for line in outcome.failures:
        print(f"FAILED {line}")
    if options.op is not None:
        print(gate.written(outcome.rows), end="")
        return bool(outcome.failures)
    if triton.__version__ != gate.pinned():
        print(f"the record is of Triton {gate.pinned()}: only failures count")
        return bool(outcome.failures)
    if options.write:
        gate.RECORD.write_text(gate.written(outcome.rows))
        print(f"wrote {gate.RECORD}")
        return bool(outcome.failures)
    changed = gate.differences(outcome, gate.recorded())
    for line in changed:
        print(line)
    if changed:
        print(f"{len(changed)} lines differ from {gate.RECORD.name}; if they are meant, run")
        print("`make triton-record` and commit it")
    return bool(outcome.failures or changed)


if __name__ == "__main__":
    sys.exit(main())
