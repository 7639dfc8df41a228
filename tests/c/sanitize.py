"""Runs the C tests of core and kernels under AddressSanitizer and UBSan, on every ISA here."""

import argparse
import sys
import time

import cbuild


def main() -> int:
    """Build, run, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=150, help="cases of the fuzz driver")
    options = parser.parse_args()
    start = time.monotonic()
    # GCC's own AVX-512 headers warn when instrumented; other builds keep warnings as errors.
    folder = cbuild.build("sanitize", "-DFEINWERK_SANITIZE=ON", "-DFEINWERK_WERROR=OFF")
    print(f"sanitize: built in {time.monotonic() - start:.0f} s", flush=True)
    for command in (["test_abi"], ["fuzz", options.iterations]):
        start = time.monotonic()
        result = cbuild.run(
            folder / command[0],
            *command[1:],
            # Not detect_stack_use_after_return: GCC 12 misaligns 64-byte vectors on its fake stack
            # (GCC bug 110027), and an aligned AVX-512 store to one is a fault.
            ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=0",
            UBSAN_OPTIONS="print_stacktrace=1",
        )
        print(result.stdout + result.stderr, end="")
        if result.returncode:
            print(f"sanitize: {command[0]} failed")
            return 1
        print(f"sanitize: {command[0]} clean in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
