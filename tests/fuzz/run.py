"""Feeds ``ara`` with files, names and numbers that nobody meant, and looks for anything but a clean answer.

    python -m tests.fuzz --cases 20000 --seed 0          everything
    python -m tests.fuzz --target ranks --cases 500      one kind of input
    python -m tests.fuzz --target ranks --index 17       one case, with all that it says

The property (:mod:`tests.fuzz.harness`): exit code 0, 1 or 2, at most one ``error:`` line and hints, no traceback,
nothing half-written, under 2 GiB and 20 s. The inputs (:mod:`tests.fuzz.targets`) are valid files spoilt at one to
three places: random bytes alone would all be refused by the first check.

Cases come from seeded generators of our own and not from Hypothesis: a case may have to be killed, which its runner
does not survive; it draws a case in about 6 ms where ours take less than one; and what a seed means there changes with
its version. A case is known by target, seed and index. What shrinking would give is had by cases that are small from
the start: of all cases that fail alike the smallest is kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.fuzzer import Fuzzer
from tests.fuzz.harness import Case
from tests.fuzz.supervisor import Ended, Limits, run_all
from tests.fuzz.targets import TARGETS, weighted

_SHOWN_LINE = 160


@dataclass
class _Found:
    """Failures that look alike."""

    kind: str
    signature: str
    text: str
    target: str
    index: int
    size: int
    count: int = 0
    targets: set[str] = field(default_factory=set)


@dataclass
class _Tally:
    """Figures of one target."""

    cases: int = 0
    failed: int = 0
    cpu_seconds: float = 0.0
    slowest: float = 0.0
    resident_bytes: int = 0
    codes: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def main(words: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    given = _arguments(words)
    if given.list:
        print("\n".join(TARGETS))
        return 0
    with tempfile.TemporaryDirectory(prefix="ara-fuzz-") as folder:
        start = time.monotonic()
        fuzzer = Fuzzer(Path(folder).resolve(), given.seed)
        here = os.getcwd()
        try:
            if given.index is not None:
                return 0 if all([fuzzer.show(name, given.index) for name in given.target]) else 1
            return _run(fuzzer, given, start)
        finally:
            os.chdir(here)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Feed ara with spoilt input.")
    parser.add_argument("--cases", type=int, default=20_000, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), metavar="NAME", help="only this kind of input"
    )
    parser.add_argument("--index", type=int, help="run only this case of --target, and print what it says")
    parser.add_argument("--seconds", type=float, default=900.0, help="stop after this time")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--case-seconds", type=float, default=20.0, help="limit of one case")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for inputs that failed")
    parser.add_argument("--list", action="store_true", help="list the targets")
    given = parser.parse_args(words)
    if given.index is not None and not given.target:
        parser.error("--index wants a --target")
    return given


def _run(fuzzer: Fuzzer, given: argparse.Namespace, start: float) -> int:
    plan = _plan(given.target or list(TARGETS), given.cases)
    print(f"{len(plan)} cases of {len(set(name for name, _ in plan))} targets, seed {given.seed}", flush=True)
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    found: dict[str, _Found] = {}
    ready = time.monotonic()
    ended = run_all(
        list(range(len(plan))),
        lambda slot, number: fuzzer.work(slot, *plan[number]),
        workers=given.workers,
        limits=Limits(given.case_seconds),
        until=start + given.seconds,
    )
    done = 0
    for one in ended:
        done += 1
        _note(one, *plan[one.number], tallies[plan[one.number][0]], found, fuzzer)
        if done % 1000 == 0:
            print(f"  {done} cases, {len(found)} distinct failures, {time.monotonic() - start:.0f} s", flush=True)
    _print_tallies(tallies)
    _print_found(found.values(), fuzzer, given.keep)
    now = time.monotonic()
    each = (now - ready) * given.workers / max(1, done) * 1000
    print(f"\n{done} of {len(plan)} cases in {now - start:.0f} s ({each:.0f} ms each on {given.workers} workers), "
          f"{sum(one.count for one in found.values())} failures, {len(found)} distinct")  # fmt: skip
    if done < len(plan):
        print(f"error: the time of {given.seconds:g} s was up before all cases were done", file=sys.stderr)
    return 1 if found or done < len(plan) else 0


def _plan(names: Sequence[str], cases: int) -> list[tuple[str, int]]:
    """Return target and index of every case, targets mixed by their weights."""
    plan: list[tuple[str, int]] = []
    counts: dict[str, int] = defaultdict(int)
    turn = weighted(names)
    while len(plan) < cases:
        name = turn[len(plan) % len(turn)]
        plan.append((name, counts[name]))
        counts[name] += 1
    return plan


def _note(one: Ended, target: str, index: int, tally: _Tally, found: dict[str, _Found], fuzzer: Fuzzer) -> None:
    tally.cases += 1
    tally.slowest = max(tally.slowest, one.seconds)
    tally.resident_bytes = max(tally.resident_bytes, one.resident_bytes)
    if one.report is None:
        assert one.reason is not None
        case = fuzzer.case(target, index)
        failures = [[one.reason[0], f"{one.reason[0]}: {target}, {case.argv[0]}", one.reason[1]]]
        size = case.size
    else:
        failures, size = one.report["failures"], one.report["size"]
        tally.cpu_seconds += one.report["cpu"]
        tally.codes[str(one.report["code"])] += 1
    tally.failed += bool(failures)
    for kind, signature, text in failures:
        same = found.get(signature)
        if same is None or size < same.size:
            count, targets = (same.count, same.targets) if same else (0, set())
            same = found[signature] = _Found(kind, signature, text, target, index, size, count, targets)
        same.count += 1
        same.targets.add(target)


def _print_tallies(tallies: dict[str, _Tally]) -> None:
    print(f"\n{'target':<18} {'cases':>6} {'failed':>6} {'exit 0/1/2':>17} {'CPU ms':>6} {'max s':>6} {'MiB':>6}")
    for name in (name for name in TARGETS if name in tallies):
        one = tallies[name]
        codes = "/".join(str(one.codes[code]) for code in ("0", "1", "2"))
        print(f"{name:<18} {one.cases:>6} {one.failed:>6} {codes:>17} {one.cpu_seconds / one.cases * 1000:>6.0f} "
              f"{one.slowest:>6.1f} {one.resident_bytes / 2**20:>6.0f}")  # fmt: skip


def _print_found(found: Iterable[_Found], fuzzer: Fuzzer, keep: Path) -> None:
    for number, one in enumerate(sorted(found, key=lambda one: (one.kind, -one.count)), start=1):
        case = fuzzer.case(one.target, one.index)
        folder = keep.absolute() / f"{number:03d}-{one.kind}-{one.target}-{one.index}"
        _store(folder, case, one, fuzzer.seed)
        first = one.text.strip().splitlines() or [""]
        print(f"\n[{number}] {one.kind} ×{one.count} ({', '.join(sorted(one.targets))}): {one.signature}")
        print(f"    {first[0][:_SHOWN_LINE]}")
        print(
            f"    ara {shlex.join(case.argv)[:_SHOWN_LINE]}  ({', '.join(case.files) or 'no files'})"[: 2 * _SHOWN_LINE]
        )
        print(f"    again: --target {one.target} --seed {fuzzer.seed} --index {one.index}")


def _store(folder: Path, case: Case, one: _Found, seed: int) -> None:
    """Write a case that failed where people can look at it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = [
        f"ara {shlex.join(case.argv)}",
        f"python -m tests.fuzz --target {one.target} --seed {seed} --index {one.index}",
        one.signature,
        *(f"{name}: {content}" for name, content in case.files.items() if not isinstance(content, bytes)),
        *([f"stdin: {case.stdin!r}"] if case.stdin else []),
        one.text,
    ]
    (folder / "about.txt").write_text("\n".join(about) + "\n", encoding="utf-8", errors="backslashreplace")
    for name, content in case.files.items():
        if isinstance(content, bytes):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
