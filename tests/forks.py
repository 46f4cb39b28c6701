"""Commands in processes of their own, which fail at a given place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How a process has ended.

    Attributes:
        status: wait status.
        seconds: from the start of the command.
        output: stdout and stderr.
    """

    status: int
    seconds: float
    output: str

    @property
    def code(self) -> int:
        """Exit code; the negative signal number of a killed process."""
        return os.waitstatus_to_exitcode(self.status)


def killed_at(place: str, call: int = 1, when: str = "before", rank: int = 0) -> dict[str, Any]:
    """Return a fault: the process kills itself, as ``kill -9`` does, at a call of ``module:function``."""
    return {"rank": rank, "place": place, "call": call, "when": when}


def raising_at(place: str, error: str, call: int = 1, rank: int = 0) -> dict[str, Any]:
    """Return a fault: a call of ``module:function`` raises a NumericalError."""
    return {"rank": rank, "place": place, "call": call, "when": "before", "error": error}


def with_value(place: str, value: str, rank: int = 0) -> dict[str, Any]:
    """Return a fault: ``module:name`` has another value."""
    return {"rank": rank, "place": place, "value": value}


class Forks:
    """Runs commands in forked processes of one server."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(self, arguments: Sequence[Any], size: int = 1, faults: Sequence[dict[str, Any]] = ()) -> list[Ended]:
        """Run ``ara ARGUMENTS`` in ``size`` processes, as torchrun does, and return how they end."""
        return self._ask(arguments=[str(word) for word in arguments], size=size, faults=list(faults))

    def call(self, place: str, size: int) -> list[Ended]:
        """Call ``module:function`` in ``size`` processes, and return how they end."""
        return self._ask(call=place, size=size, faults=[])

    def _ask(self, **request: Any) -> list[Ended]:
        assert self._server.stdin is not None and self._server.stdout is not None
        request |= {"log": str(self._log), "port": free_port()}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        found = json.loads(self._server.stdout.readline())
        return [
            Ended(status, seconds, Path(f"{self._log}.{rank}").read_text())
            for rank, (status, seconds) in enumerate(found)
        ]


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
