"""Fixtures for every test: the backends in turn, poisoned fresh memory, hypothesis profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from feinwerk import _library, testing
from feinwerk.testing.poison import poisoned

# The same examples on every run: a failure in CI is a failure here.
_COMMON: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("ci", max_examples=20, **_COMMON)
hypothesis.settings.register_profile("full", max_examples=150, **_COMMON)
# Triton's interpreter takes about a millisecond for every operation of every program.
hypothesis.settings.register_profile("interpreter", max_examples=4, **_COMMON)

# Small tensors on a busy machine: waking a second thread costs more than the work. The tests that
# are about threads set their own number.
torch.set_num_threads(1)


# Triton's interpreter takes the compiler's place in its process, which runs the tests of ops and of
# the optimizers over them; the files that only it can run are its own.
_OF_KERNELS = {"ops", "optim"}
if _library.interpreting():
    _folders = (path for path in Path(__file__).parent.iterdir() if path.is_dir())
    collect_ignore_glob = [f"{path.name}/*" for path in _folders if path.name not in _OF_KERNELS]
    collect_ignore_glob.append("test_*.py")
else:
    collect_ignore_glob = ["ops/test_triton_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Take few examples in `make test`, which leaves the `full` tests out, and more elsewhere."""
    small = "not full" in config.option.markexpr
    hypothesis.settings.load_profile("ci" if small else "full")
    if _library.interpreting():
        from tests import triton_interpreter

        triton_interpreter.mend_bf16()
        hypothesis.settings.load_profile("interpreter")
        # NumPy tells what a GPU does silently: overflow, and operations on NaN.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime")


def without_backend(item: pytest.Item) -> str:
    """Name what a test checks, whichever backend it runs on."""
    callspec = getattr(item, "callspec", None)
    backend = "" if callspec is None else callspec.params.get("backend", "")
    return item.nodeid.replace(backend, "", 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run a case on all backends in a row, so that caches of its truth are met; choose tests.

    The interpreter's process has the tests of kernels; the others have run without it.
    """
    place: dict[str, int] = {}
    items.sort(key=lambda item: place.setdefault(without_backend(item), len(place)))
    if _library.interpreting():
        from tests import interpreted_tests

        items[:], left = interpreted_tests.choose(items)
        config.hook.pytest_deselected(items=left)


@pytest.fixture(params=testing.backend_ids())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each backend and ISA of this machine."""
    with testing.use_backend(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Start every test with one torch thread, where torch's own sums have one order."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what feinwerk allocates: an element that a kernel forgets to write shows as NaN."""
    with poisoned():
        yield
