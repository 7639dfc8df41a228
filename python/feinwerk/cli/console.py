"""What the user sees while a command runs: progress bars, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Without a terminal (a log file, CI) a line at every tenth of a phase stands for the bar.
LINES_PER_PHASE = 10


class Bar:
    """One phase's progress."""

    def __init__(self, display: Display, title: str, total: int) -> None:
        """Start at nothing done."""
        self._display = display
        self._title = title
        self._total = total
        self._done = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, progress: Progress | None) -> None:
        """Show the bar, if there is one to show."""
        self._progress = progress
        if progress is not None:
            self._task = progress.add_task(self._title, total=self._total, note="")

    def total(self, count: int) -> None:
        """Correct the total, once it is known."""
        self._total = count
        if self._progress is not None:
            self._progress.update(self._task, total=count)

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are done, with a note beside the bar."""
        before, self._done = self._done, done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif done * LINES_PER_PHASE // self._total > before * LINES_PER_PHASE // self._total:
            self._display.line(f"  {self._title} {done}/{self._total}  {note}".rstrip())

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` to what is done."""
        self.update(self._done + count, note)


class Display:
    """The console of one run; `quiet` keeps only what `result` prints."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Print to `console`, by default stdout's."""
        self.console = console or Console(highlight=False)
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Show a phase while it runs and keep the seconds it took."""
        started = time.perf_counter()
        bar = Bar(self, title, total or 1)
        try:
            if self.quiet or not self.console.is_terminal:
                self.line(title)
                bar.start(None)
                yield bar
            else:
                with self._progress(with_bar=total is not None) as progress:
                    bar.start(progress)
                    yield bar
        finally:
            spent = time.perf_counter() - started
            self.seconds[title] = self.seconds.get(title, 0.0) + spent

    def line(self, text: str, style: str = "") -> None:
        """Print a line, except when quiet."""
        if not self.quiet:
            self.result(text, style)

    def result(self, text: str, style: str = "") -> None:
        """Print a line, also when quiet."""
        self.console.print(escape(text), style=style, soft_wrap=True)

    def _progress(self, *, with_bar: bool) -> Progress:
        # transient: the summary line that follows a phase says more than a full bar.
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if not with_bar:
            return Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        return Progress(
            *columns,
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
