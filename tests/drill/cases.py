"""One strike each: what is done to a command, and what must hold afterwards."""

from __future__ import annotations

import math
import random
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.drill.disk import Disk
from tests.drill.process import Ended, Fault, ara
from tests.drill.result import differences, faults_of, snapshot
from tests.drill.stages import Scenario

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FULL = re.compile(r"disk is full|MiB free|No space left")
# What kills are aimed at, in turn: touches of the disk are most likely to hit something.
_KILLS = ("touch", "time", "touch", "file")
# Moments that are tried before a command counts as too quick for one.
_TRIES = 6


@dataclass(frozen=True)
class Reference:
    """What a command does when nothing befalls it.

    Attributes:
        scenario: the command.
        base: folder that it is begun in.
        result: snapshot of what it leaves.
        seconds: that it takes.
        touches: of the disk.
        largest: bytes of the largest file that it writes.
        growth: bytes that it adds to the disk.
        out: its stdout.
    """

    scenario: Scenario
    base: Path
    result: dict[str, str]
    seconds: float
    touches: int
    largest: int
    growth: int
    out: str


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        kind: kill, signal, full or flip.
        subject: the scenario, or the kind of file.
        case: the number by which it can be had again.
        told: what was done.
        wrong: what does not hold; empty where all does.
        how: how the command took it, for the table.
    """

    kind: str
    subject: str
    case: int
    told: str
    wrong: tuple[str, ...] = ()
    how: str = ""


def make_reference(scenario: Scenario, base: Path, disk: Disk, runs: int = 2) -> Reference:
    """Run a command undisturbed, by default twice, and hold the results against each other.

    Raises:
        RuntimeError: it fails, or its results differ: nothing could be compared with them.
    """
    results = []
    for _ in range(runs):
        disk.fill(base)
        before, used = {path for path in disk.root.rglob("*")}, disk.used()
        ended = ara(scenario.words, disk.root)
        results.append(snapshot(disk.root))
        wrong = differences(results[-1], results[0]) + faults_of(disk.root)
        if ended.code or wrong:
            raise RuntimeError(f"{scenario.name}: exit code {ended.code}, {'; '.join(wrong)}\n{ended.err}")
    written = [path for path in disk.root.rglob("*") if path.is_file() and (scenario.again or path not in before)]
    largest = max((path.stat().st_size for path in written), default=1)
    growth = max(disk.used() - used, largest)
    return Reference(scenario, base, results[0], ended.seconds, ended.touches, largest, growth, ended.out)


def kill(reference: Reference, case: int, chance: random.Random, disk: Disk) -> Outcome:
    """Kill a command as ``kill -9`` does, and run it again: the end is as if nothing had been."""
    name = reference.scenario.name
    for attempt in range(_TRIES):
        fault = _moment(reference, _KILLS[case % len(_KILLS)], chance, signal.SIGKILL, attempt)
        disk.fill(reference.base)
        struck = ara(reference.scenario.words, disk.root, fault)
        if struck.code == 0:
            continue
        wrong = [] if struck.code in (-signal.SIGKILL, -signal.SIGXFSZ) else [f"it ended by {struck.code}"]
        wrong += _afterwards(reference, struck, disk)
        return Outcome("kill", name, case, str(fault), tuple(wrong), "went on")
    return Outcome("kill", name, case, str(fault), how="too quick")


def interrupt(reference: Reference, case: int, chance: random.Random, disk: Disk) -> Outcome:
    """Send a signal that asks a command to end: it ends by it, without a traceback, and can be run again."""
    scenario, sent = reference.scenario, SIGNALS[case % len(SIGNALS)]
    for attempt in range(_TRIES):
        fault = _moment(reference, chance.choice(("touch", "time")), chance, sent, attempt)
        disk.fill(reference.base)
        struck = ara(scenario.words, disk.root, fault)
        told_by = 130 if sent == signal.SIGINT else -sent
        kept = sent == signal.SIGINT and scenario.keeps_on_interrupt and "the best so far is kept" in struck.err
        if struck.code == 0 and not kept:
            continue
        wrong = [] if kept or struck.code == told_by else [f"it ended by {struck.code}, not {told_by}"]
        wrong += [f"it said: {struck.err[-600:]}"] if "Traceback" in struck.err or struck.errors else []
        wrong += _afterwards(reference, struck, disk)
        return Outcome("signal", scenario.name, case, str(fault), tuple(wrong), sent.name)
    return Outcome("signal", scenario.name, case, str(fault), how="too quick")


def fill_up(reference: Reference, case: int, chance: random.Random, disk: Disk) -> Outcome:
    """Give a command too little disk: one line says so, nothing half stands under a final name, later it works."""
    scenario = reference.scenario
    for attempt in range(_TRIES):
        disk.fill(reference.base)
        if case % 3 == 2 or not disk.mounted:
            fault = Fault(full=True, at=chance.randint(1, max(1, reference.touches - attempt)))
            told = str(fault)
        else:
            free = int(reference.growth * chance.random() * 0.9**attempt)
            fault, told = Fault(), f"{free // 1024} KiB free"
            disk.limit(free)
        struck = ara(scenario.words, disk.root, fault)
        disk.limit(None)
        if struck.code == 0:
            continue
        lines = [line for line in struck.err.splitlines() if line.startswith(("error:", "hint:", "Traceback"))]
        wrong = [] if struck.code == 1 else [f"it ended by {struck.code}"]
        if [line.partition(":")[0] for line in lines] not in (["error"], ["error", "hint"]):
            wrong.append(f"not one error line: {struck.err[-800:]}")
        elif not _FULL.search(lines[0]):
            wrong.append(f"it does not say that the disk is full: {lines[0]}")
        wrong += _afterwards(reference, struck, disk)
        return Outcome("full", scenario.name, case, told, tuple(wrong), "told")
    return Outcome("full", scenario.name, case, told, how="room enough")


def _moment(reference: Reference, how: str, chance: random.Random, sent: int, attempt: int) -> Fault:
    """Choose when to strike: at a touch of the disk, in the middle of a file, or at a time."""
    if how == "touch":
        return Fault(sent, at=chance.randint(1, reference.touches))
    if how == "file":
        return Fault(size=int(math.exp(chance.uniform(0, math.log(reference.largest) * 0.9**attempt))))
    return Fault(sent, after=reference.seconds * chance.random() * 0.8**attempt)


def _afterwards(reference: Reference, struck: Ended, disk: Disk) -> list[str]:
    """Return what does not hold after a strike: results are whole; once more, and all is as it would have been."""
    wrong = [f"after the strike {fault}" for fault in faults_of(disk.root)]
    if struck.left:
        wrong.append(f"{struck.left} processes were left behind")
    again = ara(reference.scenario.words, disk.root)
    if again.code:
        return [*wrong, f"the second run ends by {again.code}: {again.err[-600:]}"]
    wrong += differences(snapshot(disk.root), reference.result) + faults_of(disk.root)
    if "--source" not in reference.scenario.words:
        status = ara(["status", "-w", "ws"], disk.root)
        if status.code or re.search(r"\b(partial|damaged|stale)\b", status.out):
            wrong.append(f"ara status says: {status.out} {status.err}")
    return wrong
