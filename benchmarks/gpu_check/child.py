"""The process of one check: ``python -m benchmarks.gpu_check.child MODULE:FUNCTION SETTING OUTCOME``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.outcome import Notes, Outcome, outcome_of
from benchmarks.gpu_check.setting import Setting


def main(function: str, given: Path, written: Path) -> None:
    """Run a check and write its outcome.

    Args:
        function: ``module:name``.
        given: JSON file of the setting.
        written: JSON file for the outcome; after an error of ours it holds what was found so far.
    """
    setting = Setting.model_validate_json(given.read_text(encoding="utf-8"))
    module, _, name = function.partition(":")

    def check(setting: Setting, notes: Notes) -> None:
        getattr(import_module(module), name)(setting, notes)

    outcome: Outcome = outcome_of(check, setting, Notes(written))
    written.write_text(outcome.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
