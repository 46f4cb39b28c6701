"""What vLLM finds of ARA when it starts, and that nothing of it is loaded where vLLM is missing."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import export.vllm

ROOT = Path(__file__).resolve().parents[4]


def test_the_entry_point_names_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["ara"].partition(":")
    assert getattr(importlib.import_module(module), function) is export.vllm.register


def test_importing_the_package_loads_neither_vllm_nor_torch():
    code = "import sys, export.vllm; print([name for name in ('vllm', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_vllm_that_ara_does_not_know_is_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "export.vllm.config", raising=False)
    with caplog.at_level(logging.WARNING, "vllm.ara"):
        export.vllm.register()
        export.vllm.register()
    assert "cannot serve ARA checkpoints" in caplog.text
