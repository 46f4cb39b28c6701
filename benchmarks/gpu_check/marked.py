"""The tests marked ``gpu``, run by pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.outcome import Notes, NotRun
from benchmarks.gpu_check.setting import Setting

# Names the device of tests/gpu; see tests/gpu/conftest.py.
DEVICE_VARIABLE = "ARA_TEST_DEVICE"
_REPOSITORY = Path(__file__).resolve().parents[2]


def marked_tests(setting: Setting, notes: Notes) -> None:
    """Run the tests in a further process, and keep what they gave."""
    run_tests(_REPOSITORY / "tests" / "gpu", setting, notes)


def run_tests(tests: Path, setting: Setting, notes: Notes) -> None:
    """Run the tests marked ``gpu`` below a folder.

    Raises:
        NotRun: all of them were skipped.
        RuntimeError: pytest did not come to its end.
    """
    report = setting.workspace / "tests.xml"
    command = [sys.executable, "-m", "pytest", str(tests), "-m", "gpu", "-n", "0", "-q", f"--junitxml={report}"]
    environment = {**os.environ, DEVICE_VARIABLE: setting.device}
    ended = subprocess.run(command, cwd=_REPOSITORY, env=environment, check=False)
    if not report.is_file():
        raise RuntimeError(f"pytest ended with exit code {ended.returncode} and wrote no report")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = _with(cases, "skipped")
    notes.keep("tests", len(cases))
    notes.keep("skipped", skipped)
    notes.keep("failed", sorted({**_with(cases, "failure"), **_with(cases, "error")}))
    notes.misses += [f"{name} failed" for name in notes.numbers["failed"]]
    # An error of collection, say, is the failure of no test.
    if ended.returncode not in (0, 1) or not cases:
        notes.misses.append(f"pytest ended with exit code {ended.returncode} after {len(cases)} tests")
    if cases and len(skipped) == len(cases):
        raise NotRun(f"all {len(cases)} tests were skipped: {'; '.join(sorted(set(skipped.values())))}")
    notes.detail = f"{len(cases) - len(skipped)} tests passed, {len(skipped)} skipped"


def _with(cases: Iterable[ElementTree.Element], kind: str) -> dict[str, str]:
    """Return test → message of those that ended in one way: skipped, failure or error."""
    found = {}
    for case in cases:
        if (part := case.find(kind)) is not None:
            found[f"{case.get('classname')}.{case.get('name')}"] = part.get("message", "")
    return found
