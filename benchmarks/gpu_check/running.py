"""Runs checks one after the other, each in a process of its own, within a budget of seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.outcome import UNFINISHED, Outcome
from benchmarks.gpu_check.setting import Setting

# A check is not started with less than this part of its share: it would only be stopped.
_LEAST_SHARE = 0.5
# Lines of its log that a failed check leaves in the results.
_LOG_LINES = 25
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CheckEntry:
    """One check of the table.

    Attributes:
        name: for options and results.
        title: what it checks, in words.
        function: ``module:name`` of a :data:`benchmarks.gpu_check.outcome.Check`.
        seconds: its share of the budget; then it is stopped.
        with_vllm: whether it needs the Python that has vLLM.
    """

    name: str
    title: str
    function: str
    seconds: float
    with_vllm: bool = False


def run_checks(
    checks: Sequence[CheckEntry],
    setting: Setting,
    budget: float,
    vllm_python: str = sys.executable,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[CheckEntry, Outcome]]:
    """Yield every check with its outcome, as soon as there is one.

    Args:
        checks: in their order.
        setting: of all of them.
        budget: seconds for all together; if it is more than the sum of their shares, every share is as much longer.
        vllm_python: Python for the checks that need vLLM.
        clock: returns seconds.
    """
    begun = clock()
    longer = max(1.0, budget / sum(check.seconds for check in checks))
    for check in checks:
        left, share = budget - (clock() - begun), longer * check.seconds
        if left < _LEAST_SHARE * share:
            detail = f"{max(0.0, left):.0f} of {budget:.0f} s were left, and it may take {share:.0f} s"
            yield check, Outcome(status="not run", detail=detail)
        else:
            python = vllm_python if check.with_vllm else sys.executable
            yield check, run_check(check, setting, min(left, share), python)


def run_check(check: CheckEntry, setting: Setting, limit: float, python: str = sys.executable) -> Outcome:
    """Run one check in a new process, and stop that and its children after ``limit`` seconds."""
    folder = setting.workspace
    given, outcome, log = (folder / f"{check.name}.{end}" for end in ("setting.json", "outcome.json", "log"))
    given.write_text(setting.model_dump_json(), encoding="utf-8")
    outcome.unlink(missing_ok=True)
    command = [python, "-m", "benchmarks.gpu_check.child", check.function, str(given), str(outcome)]
    begun = time.monotonic()
    with log.open("wb") as output:
        # A session of its own: what it starts is stopped with it.
        process = subprocess.Popen(
            command, cwd=_REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also what a finished check has left running: it would hold memory of the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = _read(outcome)
    if code is None:
        found.status, found.detail = "failed", f"stopped after {limit:.0f} s, its share of the time"
    elif found.detail == UNFINISHED:
        found.detail = f"its process ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"
    found.seconds = time.monotonic() - begun
    if found.status == "failed":
        found.log = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
    return found


def _read(path: Path) -> Outcome:
    """Return what a check has written so far."""
    if not path.is_file():
        return Outcome(status="failed", detail=UNFINISHED)
    return Outcome.model_validate_json(path.read_text(encoding="utf-8"))
