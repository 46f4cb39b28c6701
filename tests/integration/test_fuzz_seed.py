"""A small, fixed part of `make fuzz`, so that a fault of a kind that it knows shows at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

REPOSITORY = Path(__file__).resolve().parents[2]
# Nearly a round of all targets by their weights.
CASES = 200


@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported, and counts resident memory")
def test_spoilt_input_gets_a_clean_answer(tmp_path):
    words = [
        "--cases",
        str(CASES),
        "--seed",
        "0",
        "--workers",
        "1",
        "--seconds",
        "280",
        "--keep",
        str(tmp_path / "kept"),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert f"{CASES} of {CASES} cases" in result.stdout
    for name in TARGETS:
        assert f"\n{name} " in result.stdout
