"""The rows of a training: what follows from them, and their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ara import events
from ara.errors import NumericalError
from ara.recovery.history import EVENTS_FILE, History, Row
from tests.recovery import MemorySaved


def history(*checks: float | None) -> History:
    return History(
        [Row(step, step and 0.5, value, 1e-4, 2.0, 10 * step, 1.5 * step) for step, value in enumerate(checks)]
    )


def test_the_best_check_is_the_first_of_the_lowest() -> None:
    found = history(3.0, None, 2.0, 2.0, 2.5)
    assert found.best_step == 2 and found.checks_since_best() == 2
    assert found.step == 4 and found.tokens == 40 and found.seconds == 6.0
    assert History().seconds == 0.0


def test_plain_data_gives_the_same_history() -> None:
    found = history(3.0, None, 2.0)
    assert History.from_plain(found.plain()).rows == found.rows


@pytest.mark.parametrize(
    "change", [lambda rows: rows[1:], lambda rows: [], lambda rows: [{"step": 0}], lambda rows: None]
)
def test_incomplete_rows_are_refused(change: Any) -> None:
    with pytest.raises(ValueError, match=r"complete|valid"):
        History.from_plain(change(history(3.0, None, 2.0).plain()))


def test_divergence_is_two_checks_far_above_the_first() -> None:
    history(1.0, 9.0).check_divergence()
    history(1.0, 9.0, 2.9).check_divergence()
    with pytest.raises(NumericalError, match=r"grown by 2\.5 nats"):
        history(1.0, 9.0, 3.5).check_divergence()


class _Writer:
    """Stands for TensorBoard's writer: one line per value, in a file with the name of the machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.file = (folder / "events.out.tfevents.1.somebody").open("w")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not math.isnan(value)
        self.file.write(f"{name} {value} {step}\n")


def test_log_and_events_have_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = MemorySaved(tmp_path)
    monkeypatch.setattr(events, "event_writer_class", lambda: _Writer)
    found = history(3.0, None, 2.0)
    for _ in range(2):
        found.write(saved, events=True)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "step,loss,held_out,rate,gradient,tokens,seconds" and len(lines) == 4
    written = (tmp_path / EVENTS_FILE).read_text().splitlines()
    assert "held_out 2.0 2" in written and sum(line.startswith("held_out") for line in written) == 2
    assert "tfevents" in EVENTS_FILE and {path.name for path in tmp_path.iterdir()} == {"log.csv", EVENTS_FILE}
