"""The only module that prints.

Progress goes to stderr: verb lines, facts, bars, warnings. Results go to stdout: tables, text, or with ``--json``
exactly one JSON document. Only terminals get colours and moving bars. Rich is imported when it is first used, so that
``ara --help`` is fast.
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
from ara.progress import SILENT, Bar
from ara_cli.bars import LiveBars, LoggedBar

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

# Wider than any table: a file or a pipe has no width to fold at.
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
        header: quantity with its unit: ``"size (MiB)"``.
        justify: left for text, right for numbers.
    """

    header: str
    justify: Literal["left", "right"] = "right"


def columns(first: str, *others: str) -> list[Column]:
    """Return columns with these headers: text on the left in the first one, numbers on the right in the others."""
    return [Column(first, "left"), *map(Column, others)]


class Console:
    """Prints everything; implements :class:`ara.progress.Reporter`.

    Args:
        quiet: print only warnings, errors and results.
        as_json: stdout gets only one JSON document; tables and text go to stderr.
        stdout: for results; the present ``sys.stdout`` by default.
        stderr: for everything else; the present ``sys.stderr`` by default.
        environ: variables (NO_COLOR, TERM); ``os.environ`` by default.
        clock: monotonic, in seconds.

    Attributes:
        reader_gone: a stream has no reader any more, as with ``ara models | head -1`` or a closed stdout.
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

    # -- progress: stderr ----------------------------------------------------------------------------------------

    def step(self, text: str) -> None:
        """Start a new piece of work with a verb line: ``Decomposing 210 linear layers``."""
        if not self.quiet:
            self._tell(text, style="bold")

    def fact(self, text: str) -> None:
        """Print a fact about the running step, indented below its verb line."""
        if not self.quiet:
            self._tell(_indented(text))

    def warn(self, text: str) -> None:
        """Print a warning; ``quiet`` does not suppress it."""
        self._tell(text, label="warning: ", label_style="bold yellow")

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        """Open a bar of ``total`` units.

        On a terminal it moves, shows the time left and disappears when done. In a log there is a line every half
        minute, and one at the end if the work took more than two seconds.
        """
        if self.quiet:
            with SILENT.bar(label, total) as silent:
                yield silent
        elif self._is_terminal(self._stderr):
            with self._live_bars.open(_printable(label, self._stderr), total) as live:
                yield live
        else:
            logged = LoggedBar(label, total, self.fact, self._clock)
            yield logged
            logged.finish()

    def saved(self, path: Path | str) -> None:
        """Print the folder or file that was written."""
        if not self.quiet:
            self._tell(f"Saved in {_short(Path(path))}")

    def next_command(self, text: str) -> None:
        """Print the command that comes next."""
        if not self.quiet:
            self._tell(text, label="Next: ", label_style="bold")

    def error(self, error: AraError) -> None:
        """Print an error and its hint; with ``--json`` also as the document on stdout, unless there is one already."""
        message = str(error)
        if not isinstance(error, ProblemsError):  # errors have one line; a quoted name may contain a line break
            message = message.replace("\n", "\\n")
        self._tell(message, label="error: ", label_style="bold red")
        if error.hint:
            self._tell(error.hint, label="hint: ", label_style="bold cyan")
        if self.as_json and not self._document_written:
            self.result({"error": str(error), "hint": error.hint})

    @property
    def is_live(self) -> bool:
        """Whether moving bars may appear: stderr is a terminal, and ``quiet`` is off."""
        return not self.quiet and self._is_terminal(self._stderr)

    # -- dialogue: stdin and stdout --------------------------------------------------------------------------------

    @property
    def is_dialogue(self) -> bool:
        """Whether somebody types at a terminal and reads there; otherwise stdin is a script."""
        return not self.as_json and sys.stdin.isatty() and self._stdout.isatty()

    def ask(self, prompt: str) -> str:
        """Print a prompt and return the line that is typed after it, with the editing keys of the terminal.

        Raises:
            EOFError: Ctrl+D on an empty line.
            UnicodeDecodeError: the line is no text.
        """
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401 – input() uses it once it is imported
        with redirect_stdout(self._stdout):
            return input(prompt)

    # -- results: stdout -----------------------------------------------------------------------------------------

    def table(self, title: str, columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> None:
        """Print a table.

        Args:
            title: one line above the table; may be empty.
            columns: headers with their units.
            rows: cells in the order of ``columns``, shown by ``str``; ``None`` is shown as ``-``.
        """
        if self._results is None:
            return
        lines = self._table_lines(self._results, columns, rows)
        self._write(self._results, "\n".join(["", title, *lines, ""] if title else ["", *lines, ""]))

    def text(self, text: str) -> None:
        """Print a result that is a line of text."""
        if self._results is not None:
            self._write(self._results, text)

    def stream(self, piece: str) -> None:
        """Print a piece of generated text without a line break."""
        if self._results is not None:
            self._write(self._results, piece, end="")

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the JSON document with ``--json``, otherwise nothing.

        Args:
            data: plain values and paths; numbers must be finite, as JSON requires.

        Raises:
            ValueError: a number is NaN or infinite.
            TypeError: a value has no JSON form.
        """
        if not self.as_json:
            return
        assert not self._document_written, "a command prints one JSON document"
        # With ASCII escapes the document suits every encoding and has no control characters.
        document = json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False, default=_json_default)
        self._document_written = True
        self._write(self._stdout, document)

    @contextmanager
    def only_results_on_stdout(self) -> Iterator[None]:
        """Redirect to stderr what libraries print to stdout inside the block; results still go to stdout."""
        with redirect_stdout(self._stderr):
            yield

    def silence(self, stdout_only: bool = False) -> None:
        """Discard all further output: the reader has ended, and flushing at exit would fail again."""
        _silence(self._stdout)
        if not stdout_only:
            _silence(self._stderr)

    @property
    def _results(self) -> TextIO | None:
        """The stream for tables and text; ``None`` if they are not printed."""
        if not self.as_json:
            return self._stdout
        return None if self.quiet else self._stderr

    # -- streams -------------------------------------------------------------------------------------------------

    def _is_terminal(self, stream: TextIO) -> bool:
        return self._environ.get("TERM") != "dumb" and stream.isatty()

    @cached_property
    def _rich_stderr(self) -> RichConsole:
        """Rich's view of stderr: one object, so that lines appear above a moving bar."""
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
        """Write one line to stderr: ``label`` in its style, then the text."""
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
            # Flushing at exit would fail again. Lost progress lines are no reason to stop the work.
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
        # Drawn into a string without control characters; of a terminal only the width matters.
        width = RichConsole(file=stream).width if self._is_terminal(stream) else _UNLIMITED_COLUMNS
        canvas = RichConsole(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
        with canvas.capture() as captured:
            canvas.print(table)
        return [line.rstrip() for line in captured.get().splitlines()]


def is_reader_gone(error: OSError) -> bool:
    """Tell whether a stream could not be written because its reader has ended or because it is closed."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.EBADF)


def stdout_error(error: OSError) -> AraError:
    """Return the error for results that cannot be written."""
    return AraError(
        f"the results cannot be written to stdout ({error.strerror})",
        "finished work is kept; run the same command again with another stdout",
    )


def _silence(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _short(path: Path) -> str:
    """Return ``path`` relative to the current folder if it is inside, else unchanged."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _is_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _printable(text: str, stream: TextIO) -> str:
    """Return ``text`` without characters that control a terminal or that the stream cannot show."""
    text = printable(text)
    if _is_unicode(stream):
        return text
    return printable(text.translate(_ASCII).replace("\N{REPLACEMENT CHARACTER}", "?"), stream.encoding)


def _json_default(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
