"""Gives every architecture a forked process of its own, so that a crash or a hang of one does not end the others."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ara.models.families import Family
from tests.families.probe import probe


@dataclass(frozen=True)
class Probed:
    """The result of one architecture.

    Attributes:
        family: what came out.
        seconds: processor time of its process; 0 if it did not finish.
    """

    family: Family
    seconds: float


@dataclass(frozen=True)
class _Running:
    kind: str
    process: BaseProcess
    folder: str
    begun: float


def probe_all(architectures: Mapping[str, str], jobs: int, seconds: float) -> Iterator[Probed]:
    """Probe model types, each in a process that is forked from this one, and yield the results as they come.

    Args:
        architectures: model type → class.
        jobs: processes at a time.
        seconds: after which a process is killed.
    """
    waiting, running = deque(architectures), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                connection, started = _start(waiting[0], architectures[waiting.popleft()])
                running[connection] = started
            first = min(one.begun for one in running.values())
            ready = wait(list(running), max(0.0, first + seconds - time.monotonic()))
            late = [one for one, started in running.items() if time.monotonic() - started.begun >= seconds]
            for connection in {*ready, *late}:
                assert isinstance(connection, Connection)
                started = running.pop(connection)
                probed = _received(connection, started, architectures[started.kind], seconds)
                _end(connection, started)
                yield probed
    finally:
        for connection, started in running.items():
            _end(connection, started)


def _start(kind: str, architecture: str) -> tuple[Connection, _Running]:
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    folder = tempfile.mkdtemp(prefix="ara-family-")
    process = context.Process(target=_run, args=(kind, architecture, folder, theirs))
    process.start()
    theirs.close()
    return ours, _Running(kind, process, folder, time.monotonic())


def _run(kind: str, architecture: str, folder: str, connection: Connection) -> None:
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    begun = time.process_time()
    family = probe(kind, architecture, Path(folder))
    connection.send(Probed(family, time.process_time() - begun))


def _received(connection: Connection, started: _Running, architecture: str, seconds: float) -> Probed:
    if not connection.poll():
        reason = f"not finished after {seconds:g} seconds"
    else:
        try:
            probed: Probed = connection.recv()
        except EOFError:
            started.process.join()
            reason = f"its process ended with status {started.process.exitcode}"
        else:
            return probed
    return Probed(Family(started.kind, architecture, "fails", reason=reason), 0.0)


def _end(connection: Connection, started: _Running) -> None:
    started.process.kill()
    started.process.join()
    connection.close()
    shutil.rmtree(started.folder, ignore_errors=True)
