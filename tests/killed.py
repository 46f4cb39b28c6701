"""A stage that is killed at a chosen place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ara.workspace.writer import StageWriter


class Killed(BaseException):
    """Stands for kill -9: no code of the stage may handle it."""


@contextmanager
def killed_at(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context a stage is killed after it has stored finished work for the ``at``-th time."""
    calls = [0]

    def killing(real: Any) -> Any:
        def function(self: StageWriter, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            calls[0] += 1
            if calls[0] == at:
                raise Killed

        return function

    with monkeypatch.context() as patch:
        for name in ("finish_work", "save_checkpoint"):
            patch.setattr(StageWriter, name, killing(getattr(StageWriter, name)))
        # A killed process leaves the folder as it is.
        patch.setattr(StageWriter, "_abandon", lambda self, error: None)
        with pytest.raises(Killed):
            yield
