"""Runs core, kernels and the ONNX operators under AddressSanitizer and UBSan.

The C tests run on every ISA here. The custom-op library is loaded by ONNX Runtime in a Python
process into which the sanitizer's run time is preloaded.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cbuild

ONNX = cbuild.ROOT / "tests" / "onnx"
OPTIONS = {
    # Not detect_stack_use_after_return: GCC 12 misaligns 64-byte vectors on its fake stack
    # (GCC bug 110027), and an aligned AVX-512 store to one is a fault.
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def preloads() -> str:
    """The run times that must be in a process before an instrumented library.

    libstdc++, too: the sanitizer looks for the function that throws when it starts.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        path = cbuild.run(cbuild.program("c++"), f"-print-file-name={name}").stdout.strip()
        if not Path(path).is_absolute():
            raise FileNotFoundError(f"sanitize: the compiler has no {name}")
        found.append(path)
    return " ".join(found)


def core_is_clean(folder: Path, iterations: int) -> bool:
    """The C tests and their fuzz driver."""
    for command in (["test_abi"], ["fuzz", iterations]):
        start = time.monotonic()
        result = cbuild.run(folder / command[0], *command[1:], **OPTIONS)
        print(result.stdout + result.stderr, end="")
        if result.returncode:
            print(f"sanitize: {command[0]} failed")
            return False
        print(f"sanitize: {command[0]} clean in {time.monotonic() - start:.0f} s", flush=True)
    return True


def operators_are_clean(folder: Path, examples: int) -> bool:
    """The listed models and random ones, once it is shown that an overflow is reported."""
    library = folder / "libfeinwerk_onnx.so"
    # The interpreter and ONNX Runtime keep what they have to the end: no leaks are looked for.
    options = OPTIONS | {"ASAN_OPTIONS": OPTIONS["ASAN_OPTIONS"].replace("leaks=1", "leaks=0")}
    options |= {"LD_PRELOAD": preloads(), "OMP_NUM_THREADS": "1"}

    def python(script: str, *arguments: object) -> tuple[int, str, str]:
        result = cbuild.run(sys.executable, ONNX / script, library, *arguments, **options)
        return result.returncode, result.stdout, result.stderr

    status, _, errors = python("onnx_fuzz.py", 0, "control")
    if status == 0 or "heap-buffer-overflow" not in errors or "csrc/kernels" not in errors:
        print(f"sanitize: a read past the end of a buffer was not reported\n{errors}")
        return False
    for module in ("malformed_cases", "hosting_cases"):
        start = time.monotonic()
        status, lines, errors = python("case_run.py", module, 0)
        last = [json.loads(line) for line in lines.splitlines()]
        wrong = [line for line in last if line.get("outcome") == "wrong"]
        if status or wrong:
            print(f"sanitize: {wrong or last[-1:]}\n{errors}")
            return False
        count, seconds = len(last) // 2, time.monotonic() - start
        print(f"sanitize: {count} {module} clean in {seconds:.0f} s", flush=True)
    start = time.monotonic()
    status, lines, errors = python("onnx_fuzz.py", examples)
    if status:
        print(f"sanitize: {lines[-1000:]}\n{errors}")
        return False
    print(f"sanitize: random nodes clean, {lines.splitlines()[-1]}, ", end="")
    print(f"in {time.monotonic() - start:.0f} s", flush=True)
    return True


def main() -> int:
    """Build, run, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=150, help="cases of the fuzz driver")
    parser.add_argument("--examples", type=int, default=1000, help="random nodes of ONNX models")
    parser.add_argument("--only", choices=["core", "onnx"], help="one of the two parts")
    options = parser.parse_args()
    start = time.monotonic()
    # GCC's own AVX-512 headers warn when instrumented; other builds keep warnings as errors.
    folder = cbuild.build("sanitize", "-DFEINWERK_SANITIZE=ON", "-DFEINWERK_WERROR=OFF")
    print(f"sanitize: built in {time.monotonic() - start:.0f} s", flush=True)
    clean = True
    if options.only != "onnx":
        clean = core_is_clean(folder, options.iterations)
    if options.only != "core":
        clean = operators_are_clean(folder, options.examples) and clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
