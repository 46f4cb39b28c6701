"""Servers that tests start, and requests to them."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(
    command: Sequence[str], port: int, log: Path, *, seconds: float = 300, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server inside the block, from when it answers; the value is its address.

    Args:
        command: starts the server.
        port: it listens on.
        log: file for its output.
        seconds: for its start.
        env: its environment; ours by default.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + seconds
        while not is_up(address):
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


def is_up(address: str) -> bool:
    """Tell whether a server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False
