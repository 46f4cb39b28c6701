"""The result of a check, and how a running check reports what it finds."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ara.errors import first_line
from benchmarks.gpu_check.setting import Setting

Status = Literal["passed", "failed", "not run"]
UNFINISHED = "it ended before it was finished"


class NotRun(Exception):
    """A check cannot run on this machine; the text says what is missing."""


class Outcome(BaseModel):
    """The result of one check.

    Attributes:
        status: ``not run`` is no success: something is missing, or time ran out.
        detail: why it failed or was not run; else what it found, in words.
        seconds: that it took.
        numbers: measured, JSON data; those of a check that was stopped are there as far as it came.
        log: last lines that a failed check printed.
    """

    model_config = ConfigDict(extra="forbid")

    status: Status
    detail: str
    seconds: float = 0.0
    numbers: dict[str, Any] = {}
    log: tuple[str, ...] = ()


Check = Callable[[Setting, "Notes"], None]


class Notes:
    """Collects what a running check finds.

    Attributes:
        numbers: name → JSON data.
        misses: one line per comparison that failed.
        detail: what was found, in words.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Start without findings.

        Args:
            path: file that holds the findings so far, as an unfinished :class:`Outcome`; ``None``: no file.
        """
        self.numbers: dict[str, Any] = {}
        self.misses: list[str] = []
        self.detail = ""
        self._path = path
        self._compared = 0

    def keep(self, name: str, value: Any) -> None:
        """Keep a number, or other JSON data."""
        self.numbers[name] = value
        if self._path is not None:
            unfinished = Outcome(status="failed", detail=UNFINISHED, numbers=self.numbers)
            self._path.write_text(unfinished.model_dump_json(), encoding="utf-8")

    def within(self, name: str, difference: float, tolerance: float) -> None:
        """Compare a difference with its tolerance, and keep both; a NaN is a miss."""
        self._compared += 1
        if not difference <= tolerance:
            self.misses.append(f"{name}: {difference:.2g}, allowed {tolerance:.2g}")
        found = difference if math.isfinite(difference) else str(difference)
        self.keep(name, {"difference": found, "tolerance": tolerance})

    def require(self, name: str, found: Any, expected: Any) -> None:
        """Compare a value that must be the same on every device, and keep it."""
        self._compared += 1
        if found != expected:
            self.misses.append(f"{name}: {found}, expected {expected}")
        self.keep(name, found)

    def outcome(self, seconds: float) -> Outcome:
        """Return the result of a check that has come to its end."""
        if self.misses:
            more = f" (and {len(self.misses) - 3} more)" if len(self.misses) > 3 else ""
            detail = f"{'; '.join(self.misses[:3])}{more}"
            return Outcome(status="failed", detail=detail, seconds=seconds, numbers=self.numbers)
        detail = self.detail or f"{self._compared} comparisons within their tolerance"
        return Outcome(status="passed", detail=detail, seconds=seconds, numbers=self.numbers)


def outcome_of(check: Check, setting: Setting, notes: Notes) -> Outcome:
    """Run a check in this process; whatever it raises becomes part of the outcome, and a traceback goes to stderr."""
    begun = time.monotonic()
    try:
        check(setting, notes)
    except NotRun as error:
        status: Status = "not run"
        detail = str(error)
    except Exception as error:  # whatever goes wrong on a machine that we have not seen
        traceback.print_exc()
        status, detail = "failed", f"{type(error).__name__}: {first_line(error)}"
    else:
        return notes.outcome(time.monotonic() - begun)
    return Outcome(status=status, detail=detail, seconds=time.monotonic() - begun, numbers=notes.numbers)
