"""vLLM's server on a checkpoint folder, as ``vllm serve`` starts it, and a request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.greedy import NEW_TOKENS, PROMPTS, by_transformers

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
# Seconds for the server to start; it imports torch and vLLM in three processes.
START = 1200


@pytest.mark.timeout(START + 300)
def test_a_folder_is_served_without_options_of_ours(folder: Callable[..., Path], tmp_path: Path) -> None:
    source = folder("llama", "pivoted")
    with served(source, tmp_path / "log") as address:
        body = {"model": str(source), "prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = asked(f"{address}/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert [choice["token_ids"] for choice in answer["choices"]] == by_transformers(source)


@contextmanager
def served(source: Path, log: Path) -> Iterator[str]:
    """Run the server inside the block, with small caches and no compilation; the value is its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"max-model-len": 96, "max-num-seqs": 4, "kv-cache-memory-bytes": 1 << 26, "dtype": "float32"}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    # What `vllm serve` runs: the command itself does not start in the CPU build, which has another distribution's name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source), "--enforce-eager"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, *options, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START
        while not _is_up(address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def asked(url: str, body: dict[str, Any]) -> Any:
    """Return the answer to a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False
