"""A pytest plugin: a skip that the allow-list does not name fails the run (`make test-full`).

    pytest -p tests.skip_gate --skips-allowed tests/skips_allowed.txt

A line of the list is `<start of the test's id>: <start of the reason>`; # starts a comment.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skips-allowed", metavar="FILE", help="the skips that are no failure")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--skips-allowed")
    if path:
        config.pluginmanager.register(SkipGate(Path(path)), "feinwerk-skip-gate")


def read_allowed(path: Path) -> list[tuple[str, str]]:
    """The (start of id, start of reason) pairs of the list."""
    allowed = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            where, separator, reason = line.partition(": ")
            if not separator:
                raise pytest.UsageError(f"{path}: a line must be `id: reason`, got {line!r}")
            allowed.append((where.strip(), reason.strip()))
    return allowed


class SkipGate:
    """Notes every skip and fails the session for those that are not allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.allowed = read_allowed(path)
        self.refused: list[str] = []

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Keep a skip that no line of the list covers."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(
            report.nodeid.startswith(where) and reason.startswith(start)
            for where, start in self.allowed
        ):
            self.refused.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.refused:
            terminalreporter.section(f"skips that {self.path} does not allow", red=True)
            for line in self.refused:
                terminalreporter.write_line(line)
