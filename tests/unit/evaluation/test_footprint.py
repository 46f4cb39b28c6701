"""Peak memory in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ara.errors import UnavailableError
from ara.evaluation.cost import Case
from ara.evaluation.footprint import peak_memory
from tests.hungry import Hungry, die, refuse

CASE = Case(1, 0, 1)
MIB = 2**20


def test_what_a_model_takes_is_in_its_peak_and_not_in_ours(capfd: pytest.CaptureFixture[str]) -> None:
    held = bytearray(b"x") * (300 * MIB)  # ours
    small, large = (peak_memory(partial(Hungry, size * MIB), [CASE]) for size in (1, 200))
    assert small < 150 * MIB
    assert large - small == pytest.approx(199 * MIB, rel=0.05)
    assert len(held) == 300 * MIB
    assert "a library that prints" not in capfd.readouterr().out


@pytest.mark.parametrize(("load", "words"), [(refuse, "the weights are torn"), (die, "was killed")])
def test_a_failure_has_its_reason(load: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnavailableError, match=words):
        peak_memory(load, [CASE])


def test_a_kill_leaves_no_process_behind(tmp_path: Path) -> None:
    """It would hold a whole model until somebody finds it."""
    told = tmp_path / "pid"
    program = (
        "from functools import partial; from ara.evaluation.footprint import peak_memory; "
        "from tests.hungry import linger\n"
        f"if __name__ == '__main__': peak_memory(partial(linger, {str(told)!r}), [])"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as process:
        wait_for(lambda: told.exists() and told.read_text())
        process.kill()
    left = int(told.read_text())
    try:
        wait_for(lambda: not is_running(left))
    finally:
        if is_running(left):
            os.kill(left, signal.SIGKILL)


def wait_for(true: Callable[[], Any]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain for 30 s")


def is_running(process: int) -> bool:
    try:
        # A process that has ended and that nobody has asked for yet is a zombie.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
