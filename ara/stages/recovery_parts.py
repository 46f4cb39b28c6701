"""Where a level of recovery keeps finished parts of its work: in the unfinished folder of the stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ara.files import remove
from ara.recovery.base import Saved
from ara.workspace.writer import WORK, StageWriter


class LevelParts(Saved):
    """Parts of a level's work, and its unfinished state, in the folder of the stage."""

    def __init__(self, stage: StageWriter, level: str, scope: str = "") -> None:
        """Find what an interrupted run has finished.

        Args:
            stage: the writer.
            level: name of the level.
            scope: beginning of the names of all parts, for a stage that repairs several models. Such a stage keeps no
                logs.
        """
        self.stage, self.level, self._scope = stage, f"{scope}{level}", scope
        earlier = [values["seconds"] for name, values in stage.all_work().items() if name.startswith(f"{self.level}:")]
        self._checkpoint = stage.checkpoint() if level else None
        if self._checkpoint is not None and self._checkpoint[1].get("level") == self.level:
            earlier.append(self._checkpoint[1]["seconds"])
        self._started = time.monotonic() - max(earlier, default=0.0)

    def elapsed(self) -> float:
        """Return the seconds spent on the level, in interrupted runs as well."""
        return time.monotonic() - self._started

    def part(self, name: str) -> Path | None:
        """See :meth:`Saved.part`."""
        found = self.stage.work(f"{self.level}:{name}")
        return None if found is None else found[0]

    def values(self, name: str) -> dict[str, Any]:
        """See :meth:`Saved.values`."""
        found = self.stage.work(f"{self.level}:{name}")
        values: dict[str, Any] = {} if found is None else found[1]["values"]
        return values

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """See :meth:`Saved.finish_part`."""
        about = {"values": dict(values), "seconds": self.elapsed()}
        self.stage.finish_work(f"{self.level}:{name}", tensors, about)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """See :meth:`Saved.state`."""
        if self._checkpoint is None or self._checkpoint[1].get("level") != self.level:
            return None
        return self._checkpoint[0], self._checkpoint[1]["values"]

    def save_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """See :meth:`Saved.save_state`."""
        about = {"level": self.level, "values": dict(values), "seconds": self.elapsed()}
        self.stage.save_checkpoint(tensors, about)

    def log_file(self, name: str) -> Path:
        """See :meth:`Saved.log_file`."""
        if self._scope:
            # Removed with the unfinished work.
            return self.stage.folder / f"{WORK}{self._scope}{name}"
        self.stage.loose(name)
        return self.stage.folder / name

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """See :meth:`Saved.write_folder`."""
        folder = self.stage.folder / name
        remove(folder)
        folder.mkdir()
        write(folder)
        # In the journal with the next finished part.
        for path in sorted(folder.iterdir()):
            self.stage.note(f"{name}/{path.name}")
