"""Progress bars: moving ones for a terminal, lines for a log. Opened by :class:`ara_cli.console.Console` only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ara.progress import Bar
from ara_cli.formatting import percent, seconds_text

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

# Shorter work needs no line of its own in a log.
_SHORT_SECONDS = 2.0
# How often long work reports to a log.
_LOG_EVERY_SECONDS = 30.0


class QuietBar:
    """A bar that shows nothing."""

    def advance(self, amount: float = 1) -> None:
        """Do nothing."""


class LoggedBar:
    """A bar as lines of a log.

    Args:
        label: what is being done.
        total: how many units there are.
        tell: prints a line.
        clock: seconds that never run backwards.
    """

    def __init__(self, label: str, total: float, tell: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._label = label
        self._total = total
        self._tell = tell
        self._clock = clock
        self._done = 0.0
        self._start = self._told = clock()

    def advance(self, amount: float = 1) -> None:
        """Count, and report when the last report is half a minute old."""
        self._done += amount
        now = self._clock()
        if now - self._told < _LOG_EVERY_SECONDS or not 0 < self._done < self._total:
            return
        self._told = now
        elapsed = now - self._start
        left = elapsed * (self._total - self._done) / self._done
        share = percent(self._done / self._total, digits=0)
        self._tell(f"{self._label}: {share} after {seconds_text(elapsed)}, about {seconds_text(left)} left")

    def finish(self) -> None:
        """Say how long it took, if it took long."""
        elapsed = self._clock() - self._start
        if elapsed > _SHORT_SECONDS:
            self._tell(f"{self._label}: done in {seconds_text(elapsed)}")


class LiveBars:
    """Moving bars below the lines of ``console``; they vanish when done."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def open(self, label: str, total: float) -> Iterator[Bar]:
        """Show a bar; one opened inside another is one more line of the same display."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        outermost = self._progress is None
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        progress = self._progress
        task = progress.add_task(label, total=total)
        try:
            yield _LiveBar(progress, task)
        finally:
            progress.remove_task(task)
            if outermost:
                self._progress = None
                progress.stop()


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        """Move the bar."""
        self._progress.advance(self._task, amount)
