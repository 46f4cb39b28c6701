"""No telemetry: not even that of ONNX Runtime, which has it on by default."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
CODE = """
import importlib, os, sys
if sys.argv[1] != "-":
    importlib.import_module(sys.argv[1])
import onnxruntime
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


def imported(module, tmp_path):
    # The variables that a continuous integration sets silence it as well.
    silencing = ("CI", "TF_BUILD", "ORT_", "GITHUB_", "BUILD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(silencing)}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path)}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE, module],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    return done.stdout.strip(), left


@pytest.mark.parametrize("module", ["export.onnx.runner", "export.onnx.bench_runner"])
def test_onnxruntime_is_silenced_before_it_is_imported(module, tmp_path):
    said, left = imported(module, tmp_path)
    assert said == "1"
    assert not left, "something keeps a session id or events"


def test_only_the_package_that_silences_onnxruntime_imports_it():
    statement = re.compile(r"^\s*(import|from) onnxruntime\b", re.MULTILINE)
    found = {
        path.parent
        for top in ("ara", "ara_cli", "export")
        for path in (REPOSITORY / top).rglob("*.py")
        if statement.search(path.read_text(encoding="utf-8"))
    }
    assert found == {REPOSITORY / "export" / "onnx"}
