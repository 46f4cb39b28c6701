"""Progress bars for :class:`ara_cli.console.Console`: moving bars on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ara.progress import Bar
from ara_cli.formatting import percent, seconds_text

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

# Work that takes less time is not logged.
_SHORT_SECONDS = 2.0
# Interval between two lines about the same work.
_LOG_EVERY_SECONDS = 30.0


class LoggedBar:
    """A bar as lines of a log.

    Args:
        label: the work.
        total: number of units.
        write: prints a line.
        clock: monotonic, in seconds.
    """

    def __init__(self, label: str, total: float, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._label, self._total, self._write, self._clock = label, total, write, clock
        self._done = 0.0
        self._start = self._last_line = clock()

    def advance(self, amount: float = 1) -> None:
        """Count units; print a line if the last one is half a minute old."""
        self._done += amount
        now = self._clock()
        if now - self._last_line < _LOG_EVERY_SECONDS or not 0 < self._done < self._total:
            return
        self._last_line = now
        elapsed = now - self._start
        left = elapsed * (self._total - self._done) / self._done
        share = percent(self._done / self._total, digits=0)
        self._write(f"{self._label}: {share} after {seconds_text(elapsed)}, about {seconds_text(left)} left")

    def finish(self) -> None:
        """Print the duration, unless it is short."""
        elapsed = self._clock() - self._start
        if elapsed > _SHORT_SECONDS:
            self._write(f"{self._label}: done in {seconds_text(elapsed)}")


class LiveBars:
    """Moving bars below the lines of ``console``; they disappear when done."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def open(self, label: str, total: float) -> Iterator[Bar]:
        """Show a bar; nested bars are further lines of the same display."""
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
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move the bar."""
        self._progress.advance(self._task, amount)
