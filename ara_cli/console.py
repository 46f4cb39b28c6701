"""The one place that prints.

What a command *is doing* goes to stderr: verb lines, facts, bars, warnings. What it *found* goes to stdout: tables,
text, or with ``--json`` exactly one JSON document. Colours and moving bars appear on a terminal only; without one every
line is plain text. Rich is imported when the first line reaches a terminal or the first table is drawn, so that
``ara --help`` stays cheap.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from ara.errors import AraError, ProblemsError
from ara.printable import printable
from ara.progress import Bar
from ara_cli.bars import LiveBars, LoggedBar, QuietBar

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

# Wide enough for any table of ours: a file or a pipe has no width to fold at.
_UNLIMITED_COLUMNS = 1000

_ASCII = str.maketrans(
    {
        "·": "-",
        "–": "-",
        "—": "-",
        "…": "...",
        "×": "x",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "Δ": "d",
        "²": "^2",
        "µ": "u",
        "─": "-",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "\u00a0": " ",
    }
)
_SIMPLE_BOX = "    \n    \n -- \n    \n    \n    \n    \n    \n"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        header: what the numbers are, with their unit: ``"size (MiB)"``.
        justify: text stands left, numbers stand right.
    """

    header: str
    justify: Literal["left", "right"] = "right"


class Console:
    """Everything ``ara`` says; implements :class:`ara.progress.Reporter`.

    Args:
        quiet: no verb lines, facts, bars or closing lines; warnings, errors and results stay.
        as_json: stdout carries one JSON document and nothing else; tables and text move to stderr.
        stdout: where results go; ``sys.stdout`` as it is now when ``None``.
        stderr: where everything else goes; ``sys.stderr`` as it is now when ``None``.
        environ: where NO_COLOR and TERM are looked up; ``os.environ`` when ``None``.
        clock: seconds that never run backwards.

    Attributes:
        reader_gone: nobody reads a stream any more, as with ``ara models | head -1`` or a closed stdout.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        as_json: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._stdout = sys.stdout if stdout is None else stdout
        self._stderr = sys.stderr if stderr is None else stderr
        self._environ = os.environ if environ is None else environ
        self._clock = clock
        self._document_written = False
        self.reader_gone = False

    # -- what is being done: stderr ------------------------------------------------------------------------------

    def step(self, text: str) -> None:
        """Start a new piece of work with a verb line: ``Decomposing 210 linear layers``."""
        if not self.quiet:
            self._tell(text, style="bold")

    def fact(self, text: str) -> None:
        """Tell a fact about the running step, indented below its verb line."""
        if not self.quiet:
            self._tell(_indented(text))

    def warn(self, text: str) -> None:
        """Tell something that deserves a look but does not stop the work; never silenced."""
        self._tell(text, label="warning: ", label_style="bold yellow")

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        """Open a bar of ``total`` units with the time left.

        It moves, and vanishes when done, on a terminal. In a log, work longer than two seconds ends with one line and
        reports every half minute before that.
        """
        if self.quiet:
            yield QuietBar()
        elif self._is_terminal(self._stderr):
            with self._live_bars.open(_printable(label, self._stderr), total) as live:
                yield live
        else:
            logged = LoggedBar(label, total, self.fact, self._clock)
            yield logged
            logged.finish()

    def saved(self, path: Path | str) -> None:
        """Tell which folder or file a stage wrote."""
        if not self.quiet:
            self._tell(f"Saved in {_short(Path(path))}")

    def next_command(self, text: str) -> None:
        """Tell the command that comes next."""
        if not self.quiet:
            self._tell(text, label="Next: ", label_style="bold")

    def error(self, error: AraError) -> None:
        """Tell what went wrong and what to do; with ``--json`` also as the document on stdout.

        A document that was already written stays the only one.
        """
        said = str(error)
        if not isinstance(error, ProblemsError):  # a line break in a name that is quoted is none of ours
            said = said.replace("\n", "\\n")
        self._tell(said, label="error: ", label_style="bold red")
        if error.hint:
            self._tell(error.hint, label="hint: ", label_style="bold cyan")
        if self.as_json and not self._document_written:
            self.result({"error": str(error), "hint": error.hint})

    @property
    def is_live(self) -> bool:
        """Whether moving bars may appear: stderr is a terminal and nobody asked for quiet."""
        return not self.quiet and self._is_terminal(self._stderr)

    # -- what was found: stdout ----------------------------------------------------------------------------------

    def table(self, title: str, columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> None:
        """Print a table.

        Args:
            title: one line above the table; may be empty.
            columns: headers with their units.
            rows: cells in the order of ``columns``; ``None`` shows as ``-``, everything else as ``str`` has it.
        """
        if self._results is None:
            return
        lines = self._table_lines(self._results, columns, rows)
        self._write(self._results, "\n".join(["", title, *lines, ""] if title else ["", *lines, ""]))

    def text(self, text: str) -> None:
        """Print a result that is neither a table nor data: a generated sentence, for example."""
        if self._results is not None:
            self._write(self._results, text)

    def stream(self, piece: str) -> None:
        """Print a piece of text as it arrives, without a line break behind it."""
        if self._results is not None:
            self._write(self._results, piece, end="")

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the JSON document with ``--json``, otherwise nothing.

        Args:
            data: plain values and paths; numbers must be finite, because JSON knows no others.

        Raises:
            ValueError: a number is NaN or infinite.
            TypeError: a value has no JSON form.
        """
        if not self.as_json:
            return
        assert not self._document_written, "a command prints one JSON document"
        # ASCII escapes keep the document readable under every encoding and free of control characters.
        document = json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False, default=_json_default)
        self._document_written = True
        self._write(self._stdout, document)

    @contextmanager
    def only_results_on_stdout(self) -> Iterator[None]:
        """Send whatever libraries print to stdout to stderr while this is open; our own results are not touched."""
        with redirect_stdout(self._stderr):
            yield

    def silence(self, stdout_only: bool = False) -> None:
        """Say nothing more: whoever read a stream has gone, and flushing it at exit would fail again."""
        _silence(self._stdout)
        if not stdout_only:
            _silence(self._stderr)

    @property
    def _results(self) -> TextIO | None:
        """Where tables and text go, if anywhere."""
        if not self.as_json:
            return self._stdout
        return None if self.quiet else self._stderr

    # -- how it reaches the streams ------------------------------------------------------------------------------

    def _is_terminal(self, stream: TextIO) -> bool:
        return self._environ.get("TERM") != "dumb" and stream.isatty()

    @cached_property
    def _rich_stderr(self) -> RichConsole:
        """Stderr on a terminal: one object, so that lines appear above a moving bar."""
        from rich.console import Console as RichConsole

        return RichConsole(
            file=self._stderr,
            force_terminal=True,
            no_color=bool(self._environ.get("NO_COLOR")),
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    @cached_property
    def _live_bars(self) -> LiveBars:
        return LiveBars(self._rich_stderr)

    def _tell(self, text: str, *, style: str = "", label: str = "", label_style: str = "") -> None:
        """Write one line to stderr, ``label`` in its own style before the text."""
        if not self._is_terminal(self._stderr):
            self._write(self._stderr, label + text)
            return
        from rich.text import Text

        label, text = (_printable(part, self._stderr) for part in (label, text))
        if self._environ.get("NO_COLOR"):  # rich would still send bold
            style = label_style = ""
        self._rich_stderr.print(Text.assemble((label, label_style), (text, style)))

    def _write(self, stream: TextIO, text: str, end: str = "\n") -> None:
        try:
            stream.write(_printable(text, stream) + end)
            stream.flush()
        except OSError as error:
            if is_reader_gone(error):
                self.reader_gone = True
                raise
            # What could not be written would fail again at exit. Progress is not what a command is for: work goes on.
            _silence(stream)
            if stream is self._stdout:
                raise stdout_error(error) from None

    def _table_lines(self, stream: TextIO, columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> list[str]:
        from rich.box import SIMPLE_HEAD, Box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        unicode = _is_unicode(stream)
        table = Table(box=SIMPLE_HEAD if unicode else Box(_SIMPLE_BOX, ascii=True), header_style="", safe_box=False)
        table.show_edge = False
        for column in columns:
            table.add_column(Text(_printable(column.header, stream)), justify=column.justify, overflow="fold")
        for row in rows:
            assert len(row) == len(columns), f"a row of {len(row)} cells in a table of {len(columns)} columns"
            table.add_row(*(Text(_printable("-" if cell is None else str(cell), stream)) for cell in row))
        # Drawn into a string without any control character; a terminal gives only the width to fold at.
        width = RichConsole(file=stream).width if self._is_terminal(stream) else _UNLIMITED_COLUMNS
        canvas = RichConsole(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
        with canvas.capture() as captured:
            canvas.print(table)
        return [line.rstrip() for line in captured.get().splitlines()]


def is_reader_gone(error: OSError) -> bool:
    """Tell whether a stream could not be written because nobody reads it: a closed stdout is one, too."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.EBADF)


def stdout_error(error: OSError) -> AraError:
    """Return what to say when results cannot be written."""
    return AraError(
        f"the results cannot be written to stdout ({error.strerror})",
        "what was finished is kept; run the same command again with another stdout",
    )


def _silence(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _short(path: Path) -> str:
    """Return ``path`` as seen from the current folder when it lies below it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _is_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _printable(text: str, stream: TextIO) -> str:
    """Return ``text`` as the stream can show it: a model's name or its text must not steer the terminal."""
    text = printable(text)
    if _is_unicode(stream):
        return text
    return printable(text.translate(_ASCII).replace("\N{REPLACEMENT CHARACTER}", "?"), stream.encoding)


def _json_default(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
