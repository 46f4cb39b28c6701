"""The history of a training: one row per step, and what follows from the checks on held-out text."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ara.events import write_events
from ara.models.training import check_divergence
from ara.recovery.base import Saved

LOG_FILE = "log.csv"
# TensorBoard reads every file with "tfevents" in its name; its own names contain that of the machine.
EVENTS_FILE = "events.out.tfevents.distill"


@dataclass(frozen=True)
class Row:
    """One step; row 0 is the start. Losses in nats per token.

    Attributes:
        step: finished steps.
        loss: of the step's windows; ``None`` in row 0.
        held_out: loss on held-out text; ``None`` in steps without a check.
        rate: learning rate.
        gradient: norm of the gradient before clipping.
        tokens: read by training steps so far.
        seconds: since the start, without interruptions.
    """

    step: int
    loss: float | None
    held_out: float | None
    rate: float | None
    gradient: float | None
    tokens: int
    seconds: float


class History:
    """The rows of a training, in order."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)

    @classmethod
    def from_plain(cls, values: Any) -> History:
        """Return the history that :meth:`plain` describes.

        Raises:
            ValueError: it does not describe one.
        """
        rows = TypeAdapter(list[Row]).validate_python(values)
        if [row.step for row in rows] != list(range(len(rows))) or not rows or rows[0].held_out is None:
            raise ValueError("the rows of the training are not complete")
        return cls(rows)

    def plain(self) -> list[dict[str, Any]]:
        """Return the rows as JSON data."""
        return [asdict(row) for row in self.rows]

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.rows[-1].step

    @property
    def tokens(self) -> int:
        """Tokens read by training steps."""
        return self.rows[-1].tokens

    @property
    def seconds(self) -> float:
        """Seconds of training; 0 before the start."""
        return self.rows[-1].seconds if self.rows else 0.0

    @property
    def checks(self) -> dict[int, float]:
        """Step → held-out loss, nats per token."""
        return {row.step: row.held_out for row in self.rows if row.held_out is not None}

    @property
    def best_step(self) -> int:
        """The step with the lowest held-out loss; the first of equal ones."""
        checks = self.checks
        return min(checks, key=lambda step: checks[step])

    def checks_since_best(self) -> int:
        """Return the number of checks after the best one."""
        return sum(step > self.best_step for step in self.checks)

    def check_divergence(self) -> None:
        """Check the held-out losses, not those of batches, which differ by their text.

        Raises:
            NumericalError: the latest ones are far above the first one.
        """
        hint = "lower the learning rate (--rate), or use more windows per step (--batch)"
        check_divergence(list(self.checks.values()), hint)

    def write(self, saved: Saved, events: bool) -> None:
        """Write the whole log: after a resumed run it has no gap and no repeated row.

        Args:
            saved: has the files.
            events: also write TensorBoard events.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.name for column in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.plain())
        saved.log_file(LOG_FILE).write_text(text.getvalue(), encoding="utf-8")
        if events:
            with tempfile.TemporaryDirectory() as folder:
                rows = ((row.step, _scalars(asdict(row))) for row in self.rows)
                (written,) = write_events(Path(folder) / "events", rows)
                saved.log_file(EVENTS_FILE).write_bytes(written.read_bytes())


def _scalars(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: row[name] for name in ("loss", "held_out", "rate", "gradient")}
