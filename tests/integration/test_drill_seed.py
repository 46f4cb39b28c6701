"""A handful of what ``make drill`` does hundreds of times, and that the drill sees what it looks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.damage import flip
from tests.drill.result import differences, faults_of, snapshot

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_handful_of_strikes(tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--kills", "4", "--signals", "3", "--full", "2", "--flips", "11", "--stages", "allocate,truncate"]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.drill", *words, "--jobs", "1", "--json", str(figures)],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    cases = json.loads(figures.read_text())["cases"]
    assert len(cases) == 20 and not [case for case in cases if case["wrong"]]
    assert {case["how"] for case in cases} >= {"went on", "refused", "made again", "told"}
    assert not list(tmp_path.glob("ara-*"))


@pytest.fixture
def folder(copied):
    """Return a folder with a finished workspace."""
    copied.rename(copied.parent / "ws")
    return copied.parent


def test_every_bit_but_times_counts(folder):
    before = snapshot(folder)
    manifest = next(folder.glob("ws/truncate/*/manifest.json"))
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "seconds": 1e9, "created": "once"}))
    assert differences(snapshot(folder), before) == []
    manifest.write_text(json.dumps({**document, "seed": 7}))
    tensors = next(folder.glob("ws/truncate/*/checkpoint/*.safetensors"))
    flip(tensors, -1)
    (folder / "ws" / "stray").touch()
    results = next(folder.glob("ws/eval/*/results.json"))
    results.unlink()
    assert set(differences(snapshot(folder), before)) == {
        f"{manifest.relative_to(folder)} differs",
        f"{tensors.relative_to(folder)} differs",
        "ws/stray is left over",
        f"{results.relative_to(folder)} is missing",
    }
    assert len(faults_of(folder)) == 2
