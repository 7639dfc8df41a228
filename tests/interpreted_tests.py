"""Which tests the interpreter's process takes, which it leaves to `make test-full`, and why.

Triton's interpreter needs tens of milliseconds for a program. In `make test` it therefore takes a
few variants of every test function, drawn once for all, and in `make test-full` a few more: the
rest has the same kernels with other dtypes or bases. `feinwerk.testing.interpreted.some` does the
same for the loops inside of a test.
"""

from __future__ import annotations

import random

import pytest

VARIANTS, FULL_VARIANTS = 2, 4  # the second beside the first

# Parts of names of tests that say nothing about a kernel, and why.
NOT_KERNELS = {
    "any_thread_count": "threads of the CPU: torch's own products differ with their number",
    "threads_change_nothing": "threads of the CPU",
    "depend_on_threads": "threads of the CPU",
}
# Parts of names of tests that take too long for `make test`, and why.
LONG = {
    "small_updates_are_not_lost": "400 steps",
    "many_adapters_and_many_rows": "hundreds of programs",
    "order_does_not_depend_on_its_neighbours": "rows one by one",
}


def choose(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the interpreter's tests and the others; those for `make test-full` are marked."""
    kept, left = [], []
    unused: set[pytest.Item] = set()
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        ours = "triton-interpret" in item.name or item.path.match("ops/test_triton_*.py")
        if not ours or any(part in item.name for part in NOT_KERNELS):
            left.append(item)
            continue
        kept.append(item)
        every = item.path.name == "test_triton_offsets.py"  # an op each, not variants
        if not every:
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, variants in by_function.items():
        full = all(item.get_closest_marker("full") for item in variants)
        long = full or any(part in name for part in LONG)
        count = 0 if long else min(VARIANTS, len(variants))
        drawn = random.Random(name).sample(variants, min(count + FULL_VARIANTS, len(variants)))
        for item in drawn[count:]:
            item.add_marker(pytest.mark.full)
        unused |= set(variants) - set(drawn)
    return [i for i in kept if i not in unused], [*left, *unused]
