"""Pytest glue of the benchmarks: the options, the cases, and `compare`, which times and stores."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, plan, report
from benchmarks.harness import Candidate, paired
from benchmarks.store import Store
from feinwerk import backends

ROUND_SECONDS = {"quick": 1.4, "default": 1.2, "full": 2.0}
MIN_ROUNDS = {"quick": 7, "default": 5, "full": 9}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("feinwerk benchmarks")
    group.addoption("--level", choices=plan.LEVELS, default="default")
    group.addoption("--shape", default="", help="only this weight, as 4096x4096")
    group.addoption("--only", default="", help="words that a case's name must have")
    group.addoption("--results", default="", help="results file to merge into")
    group.addoption("--resume", action="store_true", help="skip what this commit has measured")
    group.addoption("--patience", type=float, default=0.0, help="seconds to wait for quiet")
    group.addoption("--forced", action="store_true", help="the user named the ISA")


def configuration() -> plan.Configuration:
    """How this process was set up by benchmarks/__main__.py."""
    return plan.Configuration(
        threads=int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()),
        isa=os.environ.get("FEINWERK_ISA", ""),
        onednn=os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    shape = tuple(int(n) for n in option.shape.split("x")) if option.shape else None
    found = plan.cases(metafunc.module.OP, option.level, configuration(), shape, option.forced)
    words = set(option.only.split())
    found = [case for case in found if words <= set(str(case).split())]
    metafunc.parametrize("case", found, ids=str)


class Session:
    """The results file, this run in it, and this process's facts."""

    def __init__(self, option: Any) -> None:
        torch.set_num_threads(configuration().threads)
        facts = json.loads(os.environ.get("FEINWERK_BENCH_RUN") or "null") or machine.run_facts()
        path = Path(option.results or plan_results())
        self.configuration = configuration()
        self.isa = backends.isa() or ""
        self.commit = str(facts["commit"])
        self.store = Store(path, machine.describe())
        self.run = self.store.begin(facts)
        self.ceilings = machine.ceilings(self.configuration.threads)
        self.store.ceilings(self.run, str(self.configuration), self.ceilings)
        self.level = option.level
        self.resume = option.resume
        self.patience = option.patience
        self.worst = 0.0
        print(f"\n{self.configuration}, kernels: {self.isa or 'reference'}")
        print(report.ceilings_line(self.ceilings))


def plan_results() -> Path:
    """Where results go unless told otherwise."""
    return Path(__file__).parent / "results" / f"{machine.name()}.json"


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return Session(request.config.option)


Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def compare(session: Session, benchmark: Any) -> Compare:
    """Return the function that times one case against its peers and limits, prints and stores."""

    def run(
        case: plan.Case,
        ours: Candidate,
        peers: Sequence[Candidate],
        missing: dict[str, str],
        *,
        read_bytes: int,
        write_bytes: int,
        operations: float = 0.0,
        limits: Sequence[Candidate] = (),
    ) -> dict[str, Any]:
        def rounds(target: Callable[[], None], setup: Callable[[], None], count: int) -> None:
            benchmark.pedantic(target, setup=setup, rounds=count, iterations=1)

        machine.wait_until_quiet(session.patience)
        started, others = time.perf_counter(), machine.OtherLoad()
        result = paired(
            ours,
            *peers,
            *limits,
            seconds=ROUND_SECONDS[session.level],
            min_rounds=MIN_ROUNDS[session.level],
            run=rounds,
        )
        mine = result.times(ours.name)
        traffic = (read_bytes + write_bytes) * 1e-9
        bound, least = machine.roofline(
            session.ceilings, session.isa, case.dtype, read_bytes, write_bytes, operations
        )
        record: dict[str, Any] = {
            **case.as_dict(),
            "threads": session.configuration.threads,
            "isa": session.isa or "reference",
            "onednn": session.configuration.onednn,
            "copies": len(ours.calls),
            "ours": mine,
            "read_bytes": read_bytes,
            "write_bytes": write_bytes,
            "gbps": traffic / mine["median"],
            "gflops": operations / mine["median"] * 1e-9,
            "bound": bound,
            "share_of_limit": least / mine["median"],
            "peers": {
                c.name: {
                    **result.times(c.name),
                    "ratio": result.ratio(c.name).as_dict(),
                    "note": c.note,
                }
                for c in peers
            },
            "limits": {
                c.name.removeprefix("limit: "): {
                    **result.times(c.name),
                    "share": result.ratio(c.name).as_dict(),
                }
                for c in limits
            },
            "missing": missing,
            "run": session.run,
            "seconds": time.perf_counter() - started,
            "others_share": others.share(),
        }
        benchmark.extra_info.update(record)
        session.store.put(case.key(session.configuration, session.isa), record)
        print(report.case_lines(str(case), record))
        return record

    return run


@pytest.fixture(autouse=True)
def skip_measured(request: pytest.FixtureRequest, session: Session) -> None:
    """With --resume, skip a case that this commit has measured."""
    case = request.node.callspec.params["case"]
    key = case.key(session.configuration, session.isa)
    if session.resume and session.store.has(key, session.commit):
        pytest.skip("measured at this commit")
    gc.collect()
