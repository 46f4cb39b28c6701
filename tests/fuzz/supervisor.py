"""Runs cases in forked workers; a case that takes too long or too much memory is ended, with its worker, and told.

Workers are forked from a process that has imported everything, so that a new one costs milliseconds. Each runs a share
of the cases, a few hundred at most: what leaks from case to case goes with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

# Cases after which a worker is replaced.
_LIFE = 250
# Seconds between two looks at the memory of the workers.
_LOOK = 0.03
# Seconds after which what a case has started is looked at, too.
_QUICK = 0.3
# Exit status of a worker in which the fuzzer itself has failed.
_BROKEN = 97


@dataclass(frozen=True)
class Limits:
    """Of one case."""

    seconds: float = 20.0
    resident_bytes: int = 2 * 2**30


@dataclass(frozen=True)
class Ended:
    """How one case ended.

    Attributes:
        number: of the case.
        seconds: that it took.
        resident_bytes: the most that was seen of its worker, with what that has started.
        report: what the worker says of it, or ``None`` when it was ended: ``reason`` tells why.
        reason: kind and words.
    """

    number: int
    seconds: float
    resident_bytes: int
    report: Any = None
    reason: tuple[str, str] | None = None


class _Worker:
    """A forked process that runs a list of cases and writes one JSON line at the start and at the end of each."""

    def __init__(self, slot: int, numbers: list[int], work: Callable[[int, int], Any]) -> None:
        self.slot, self.left = slot, numbers
        self.current: int | None = None
        self.since, self.most = time.monotonic(), 0
        self._text = b""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _live(writing, slot, numbers, work)
        os.close(writing)
        self.pipe = reading
        self._process = psutil.Process(self.pid)

    def resident(self) -> int:
        """Return the bytes that it and the processes that it has started hold."""
        found = 0
        for process in (self._process, *self._started()):
            with suppress(psutil.Error):
                found += int(process.memory_info().rss)
        return found

    def _started(self) -> list[psutil.Process]:
        # It looks at every process of the machine, and nearly all cases are over before they have started one.
        if time.monotonic() - self.since < _QUICK:
            return []
        try:
            return self._process.children(recursive=True)
        except psutil.Error:
            return []

    def lines(self) -> list[dict[str, Any]] | None:
        """Return what it has said since, or ``None`` at its end."""
        data = os.read(self.pipe, 1 << 20)
        if not data:
            return None
        *whole, self._text = (self._text + data).split(b"\n")
        return [json.loads(line) for line in whole]

    def kill(self) -> None:
        """End it with everything that it has started."""
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end and return its exit status; negative: the signal."""
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_all(
    numbers: list[int], work: Callable[[int, int], Any], *, workers: int, limits: Limits, until: float
) -> Iterator[Ended]:
    """Run cases until all are done or the time is up; yields them as they end.

    Args:
        numbers: of the cases.
        work: runs one: slot of the worker, number of the case → JSON data. It is called in a forked process.
        workers: how many at once.
        limits: of a case.
        until: ``time.monotonic()`` at which to stop.
    """
    waiting = list(reversed(numbers))
    alive: dict[int, _Worker] = {}
    free = list(range(workers))
    try:
        while (waiting or alive) and time.monotonic() < until:
            while free and waiting:
                # Shares get smaller towards the end, so that workers end together.
                size = max(1, min(_LIFE, len(waiting) // (2 * workers)))
                share = [waiting.pop() for _ in range(min(size, len(waiting)))]
                worker = _Worker(free.pop(), share, work)
                alive[worker.pipe] = worker
            ready = select.select(list(alive), [], [], _LOOK)[0]
            for pipe in ready:
                yield from _hear(alive, pipe, waiting, free)
            for worker in list(alive.values()):
                reason = _too_much(worker, limits)
                if reason is not None:
                    worker.kill()
                    yield from _bury(alive, worker, waiting, free, reason)
    finally:
        for worker in alive.values():
            worker.kill()
            worker.end()


def _hear(alive: dict[int, _Worker], pipe: int, waiting: list[int], free: list[int]) -> Iterator[Ended]:
    worker = alive[pipe]
    said = worker.lines()
    if said is None:
        yield from _bury(alive, worker, waiting, free, None)
        return
    for line in said:
        if "begin" in line:
            worker.current, worker.since, worker.most = line["begin"], time.monotonic(), 0
        else:
            worker.left = worker.left[1:]
            worker.current = None
            worker.most = max(worker.most, line["resident"])
            yield Ended(line["end"], line["seconds"], worker.most, line["report"])


def _too_much(worker: _Worker, limits: Limits) -> tuple[str, str] | None:
    if worker.current is None:
        return None
    worker.most = max(worker.most, worker.resident())
    if worker.most > limits.resident_bytes:
        return "memory", f"more than {limits.resident_bytes / 2**30:g} GiB resident"
    if time.monotonic() - worker.since > limits.seconds:
        return "time", f"more than {limits.seconds:g} s"
    return None


def _bury(
    alive: dict[int, _Worker], worker: _Worker, waiting: list[int], free: list[int], reason: tuple[str, str] | None
) -> Iterator[Ended]:
    """Take note of the end of a worker, and give what it has not done to another one."""
    del alive[worker.pipe]
    status = worker.end()
    free.append(worker.slot)
    if status == _BROKEN or (worker.current is None and worker.left):
        raise RuntimeError("the fuzzer itself has failed in a worker (what went wrong is above)")
    left = worker.left
    if worker.current is not None:
        left = left[1:]
        if reason is None:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            reason = "crash", f"the process ended by {name}"
        yield Ended(worker.current, time.monotonic() - worker.since, worker.most, None, reason)
    waiting.extend(reversed(left))


def _live(pipe: int, slot: int, numbers: list[int], work: Callable[[int, int], Any]) -> None:
    """Be a worker; never returns."""
    status, complaints = _BROKEN, os.dup(2)  # cases have the descriptors 1 and 2 to themselves
    try:
        os.setpgid(0, 0)
        process = psutil.Process()

        def say(**line: Any) -> None:
            data = json.dumps(line).encode() + b"\n"
            while data:
                data = data[os.write(pipe, data) :]

        for number in numbers:
            say(begin=number)
            start = time.monotonic()
            report = work(slot, number)
            seconds = round(time.monotonic() - start, 4)
            say(end=number, seconds=seconds, resident=process.memory_info().rss, report=report)
        status = 0
    except BaseException:
        os.write(complaints, traceback.format_exc().encode())
    finally:
        os._exit(status)
