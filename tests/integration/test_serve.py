"""``ara serve``: what it says before it becomes the server, and transformers' server itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.serve import Service
from tests.commands import ara, done, refused
from tests.servers import asked, free_port, is_up, served

NAME = "energy-0.70"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """Collect the servers that would be started; vLLM seems to be installed."""
    found: list[Service] = []
    monkeypatch.setattr(Service, "start", lambda self: found.append(self))
    monkeypatch.setattr("export.serve.find_spec", lambda name: name == "vllm" or None)
    return found


def test_the_latest_checkpoint_is_served(finished: Path, started: list[Service]) -> None:
    folder = finished / "truncate" / NAME / "checkpoint"
    result = done("serve", "-w", finished, "--port", 8123, "--", "--max-model-len", 96)
    assert result.stdout == "http://127.0.0.1:8123/v1\n"
    assert f"Starting the server of vLLM; requests name the model {folder}" in result.stderr
    assert started[0].command[-2:] == ("--max-model-len", "96") and str(folder) in started[0].command
    document = json.loads(done("serve", "--source", folder, "--json").stdout)
    assert document == {"server": "vllm", "url": "http://127.0.0.1:8000/v1", "model": str(folder)}
    refused(ara("serve", folder, "-q"), 2, "is no option of a server", "--source")
    assert len(started) == 2


def test_the_process_becomes_the_server(tmp_path: Path) -> None:
    """Its output goes to stderr: stdout has the one document of --json."""
    script = """
import sys
from pathlib import Path
from export.serve import Service
print("document", flush=True)
talks = (sys.executable, "-c", "import os; print('log', os.getpid())")
Service("vllm", "vLLM", Path("x"), "", talks).start()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "document\n", f"log {process.pid}\n")


@pytest.mark.timeout(600)
def test_transformers_serves_a_checkpoint(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """With the greedy text of ``ara generate``, and without the code that lies in the folder."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="pip install 'transformers[serving]'")
    folder: Path = checkpoint("llama", "pivoted").folder
    assert (folder / "modeling_ara.py").is_file()
    port = free_port()
    words = [
        "serve",
        "--source",
        str(folder),
        "--server",
        "transformers",
        "--port",
        str(port),
        "--",
        "--dtype",
        "float32",
    ]
    with served([sys.executable, "-m", "ara_cli", *words], port, tmp_path / "log") as address:
        body = {"model": str(folder), "messages": [{"role": "user", "content": "the river"}], "max_tokens": 12}
        answer = asked(f"{address}/v1/chat/completions", {**body, "temperature": 0})
    words = [
        "generate",
        "the river",
        "--source",
        folder,
        "--max-new-tokens",
        12,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    assert answer["choices"][0]["message"]["content"] == json.loads(done(*words, "--json").stdout)["answer"] != ""
    assert not is_up(address)
