"""The file of a benchmark's finished rows. It is written after every row, so that an interrupted run continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ara.environment import machine, now, versions


class RowFile:
    """Finished rows in one JSON file: facts that all rows share, the runs that measured them, and the rows.

    Attributes:
        path: of the file; its folder is created with the first row.
        document: all of it.
        rows: key → row. ``row["run"]`` is the index of its run, which names commit, machine and versions.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Read the rows to continue.

        Args:
            path: of the file.
            facts: JSON data that determines the rows, such as settings; the file must have the same.

        Raises:
            SystemExit: the file has other facts; its rows are not deleted.
        """
        self.path = path
        self.document: dict[str, Any] = {**facts, "runs": [], "rows": {}}
        if path.exists():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            differing = {name: self.document.get(name) for name in facts if self.document.get(name) != facts[name]}
            if differing:
                sys.exit(
                    f"error: the rows in {path} were measured with other settings: {json.dumps(differing)}\n"
                    "hint: give the same ones, or name another file with --results"
                )
        self.rows: dict[str, Any] = self.document["rows"]
        # Index of this run; its first row adds it.
        self._run: int | None = None

    def measured_now(self, key: str) -> bool:
        """Tell whether this run has measured a row, on this machine."""
        return self._run is not None and key in self.rows and self.rows[key]["run"] == self._run

    def keep(self, key: str, row: Mapping[str, Any]) -> None:
        """Add a finished row and write all rows; the file is replaced in one step."""
        if self._run is None:
            self._run = len(self.document["runs"])
            facts = {"started": now(), "commit": commit(), "machine": machine(), "versions": versions()}
            self.document["runs"].append(facts)
        self.rows[key] = {**row, "run": self._run}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def commit() -> str | None:
    """Return the commit of the code, marked if there are changes; ``None`` outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
