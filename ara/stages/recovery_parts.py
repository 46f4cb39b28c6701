"""Where a level of recovery keeps finished parts of its work: in the unfinished folder of the stage.

Of several processes, process 0 stores the parts, and all read them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ara.distributed.group import ALONE, Group
from ara.files import remove
from ara.recovery.base import Saved
from ara.workspace.writer import WORK, StageWriter, saved_checkpoint


class SharedWork:
    """Finished parts of the work of a stage; all processes call the same methods."""

    def __init__(self, stage: StageWriter | None, group: Group = ALONE) -> None:
        """Use the parts of a stage.

        Args:
            stage: the writer; ``None`` in processes that do not write.
            group: the processes.
        """
        self.stage, self.group = stage, group

    def find(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Return file and JSON data of a finished part, or ``None``."""
        found: tuple[Path, dict[str, Any]] | None
        found = self.group.broadcast(None if self.stage is None else self.stage.work(name))
        return found

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the saved state of an interrupted run; see :meth:`StageWriter.checkpoint`."""
        found = None if self.stage is None else self.stage.checkpoint()
        # Read by every process: it may be as large as the model.
        folder = self.group.broadcast(None if self.stage is None or found is None else self.stage.folder)
        return found if folder is None or self.stage is not None else saved_checkpoint(folder)

    def finish(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Store a finished part; see :meth:`StageWriter.finish_work`."""
        if self.stage is not None:
            self.stage.finish_work(name, tensors, values)

    def drop(self, prefix: str) -> None:
        """Remove the finished parts whose names start with ``prefix``."""
        if self.stage is not None:
            self.stage.drop_work(prefix)


class LevelParts(Saved):
    """Parts of a level's work, and its unfinished state, in the folder of the stage."""

    def __init__(self, work: SharedWork, level: str, scope: str = "") -> None:
        """Find what an interrupted run has finished.

        Args:
            work: of the stage.
            level: name of the level.
            scope: beginning of the names of all parts, for a stage that repairs several models. Such a stage keeps no
                logs.
        """
        self.work, self.stage, self.level, self._scope = work, work.stage, f"{scope}{level}", scope
        all_work = {} if self.stage is None else self.stage.all_work()
        earlier = [values["seconds"] for name, values in all_work.items() if name.startswith(f"{self.level}:")]
        self._checkpoint = work.checkpoint() if level else None
        if self._checkpoint is not None and self._checkpoint[1].get("level") == self.level:
            earlier.append(self._checkpoint[1]["seconds"])
        self._started = time.monotonic() - max(earlier, default=0.0)

    def elapsed(self) -> float:
        """Return the seconds spent on the level, in interrupted runs as well."""
        return time.monotonic() - self._started

    def part(self, name: str) -> Path | None:
        """See :meth:`Saved.part`."""
        found = self.work.find(f"{self.level}:{name}")
        return None if found is None else found[0]

    def values(self, name: str) -> dict[str, Any]:
        """See :meth:`Saved.values`."""
        found = self.work.find(f"{self.level}:{name}")
        values: dict[str, Any] = {} if found is None else found[1]["values"]
        return values

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """See :meth:`Saved.finish_part`."""
        about = {"values": dict(values), "seconds": self.elapsed()}
        self.work.finish(f"{self.level}:{name}", tensors, about)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """See :meth:`Saved.state`."""
        if self._checkpoint is None or self._checkpoint[1].get("level") != self.level:
            return None
        return self._checkpoint[0], self._checkpoint[1]["values"]

    def save_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """See :meth:`Saved.save_state`."""
        about = {"level": self.level, "values": dict(values), "seconds": self.elapsed()}
        if self.stage is not None:
            self.stage.save_checkpoint(tensors, about)

    def log_file(self, name: str) -> Path:
        """See :meth:`Saved.log_file`."""
        assert self.stage is not None
        if self._scope:
            # Removed with the unfinished work.
            return self.stage.folder / f"{WORK}{self._scope}{name}"
        self.stage.loose(name)
        return self.stage.folder / name

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """See :meth:`Saved.write_folder`."""
        if self.stage is None:
            return
        folder = self.stage.folder / name
        remove(folder)
        folder.mkdir()
        write(folder)
        # In the journal with the next finished part.
        for path in sorted(folder.iterdir()):
            self.stage.note(f"{name}/{path.name}")
