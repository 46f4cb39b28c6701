"""Runs the drill and prints its tables; see the package."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before torch is imported: only a process with a single thread can be forked.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1")

from tests.drill import cases, flips, preparation
from tests.drill.cases import Outcome, Reference
from tests.drill.disk import Disk, end_with_parent
from tests.drill.stages import READERS, SCENARIOS

_STRIKES = {"kill": cases.kill, "signal": cases.interrupt, "full": cases.fill_up}
# Seconds between two lines of progress.
_PULSE = 15
# Of a drilling process: set before it is forked, and the last one when it begins.
_references: dict[str, Reference] = {}
_readers: dict[str, Reference] = {}
_kinds: dict[str, flips.Kind] = {}
_seed = 0
_disk: Disk | None = None

Case = tuple[str, str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; returns 1 if one of them failed."""
    wanted = _arguments(arguments)
    begun = time.monotonic()
    _say("Importing the libraries")
    preparation.import_libraries()
    root = Path(tempfile.mkdtemp(prefix="ara-drill-"))
    try:
        outcomes = _drill(wanted, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - begun
    print(_tables(outcomes))
    failed = [outcome for outcome in outcomes if outcome.wrong]
    print(f"\n{len(outcomes)} cases, {len(failed)} failed, {seconds / 60:.1f} minutes")
    if wanted.json:
        wanted.json.write_text(
            json.dumps({"seconds": seconds, "cases": [asdict(o) for o in outcomes]}, indent=1) + "\n"
        )
    return 1 if failed else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.drill", description="Kill, interrupt, starve and damage ara.")
    parser.add_argument("--kills", type=int, default=510, help="over all stages")
    parser.add_argument("--signals", type=int, default=306, help="over all stages: SIGINT, SIGTERM and SIGHUP")
    parser.add_argument("--full", type=int, default=153, help="full disks over all stages")
    parser.add_argument("--flips", type=int, default=560, help="single bits over all kinds of files")
    parser.add_argument("--stages", metavar="NAMES", help="scenarios, several with commas [default: all]")
    parser.add_argument("--jobs", type=int, default=2, help="processes that drill")
    parser.add_argument("--seed", type=int, default=0, help="of all moments and places")
    parser.add_argument("--only", metavar="KIND:SUBJECT:CASE", help="one case, as a failure names it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome of every case here")
    wanted = parser.parse_args(arguments)
    wanted.names = list(SCENARIOS) if wanted.stages is None else wanted.stages.split(",")
    unknown = [name for name in wanted.names if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
    return wanted


def _drill(wanted: argparse.Namespace, root: Path) -> list[Outcome]:
    """Prepare and run the cases."""
    global _references, _readers, _kinds, _seed
    _seed = wanted.seed
    _say("Running every command undisturbed")
    with _pool(1, root) as pool:
        _references, finished, mounted = pool.submit(_prepare, root, wanted.names).result()
    if not mounted:
        _say("no file system may be mounted here: one process, and full disks only in part")
    jobs = wanted.jobs if mounted else 1
    _kinds = _kinds_in(finished) if wanted.flips or wanted.only else {}
    with _pool(jobs, root) as pool:
        asked = {name for kind in _kinds.values() for name in kind.readers}
        readers = {name: pool.submit(_reader, name, finished) for name in sorted(asked)}
        for name in {kind.cut_off for kind in _kinds.values()} - {None}:
            readers[f"cut off {name}"] = pool.submit(_cut_off, name, root)
        _readers = {name: reader.result() for name, reader in readers.items()}
    chosen = list(_cases(wanted))
    outcomes: list[Outcome] = []
    with _pool(jobs, root) as pool:
        told, running = time.monotonic(), [pool.submit(_case, case) for case in chosen]
        for done in as_completed(running):
            outcomes.append(done.result())
            if outcomes[-1].wrong:
                _tell(outcomes[-1])
            if time.monotonic() - told > _PULSE:
                told = time.monotonic()
                _say(f"{len(outcomes)} of {len(chosen)} cases, {sum(bool(o.wrong) for o in outcomes)} failed")
    return sorted(outcomes, key=lambda outcome: (outcome.kind, outcome.case))


def _kinds_in(finished: Path) -> dict[str, flips.Kind]:
    """Return the kinds of files that are there, each with the readers that there are."""
    found = {}
    for kind in flips.KINDS.values():
        readers = tuple(name for name in kind.readers if set(READERS[name].needs) <= set(_references))
        if kind.cut_off in _references or (readers and any(list(finished.glob(pattern)) for pattern in kind.files)):
            found[kind.name] = replace(kind, readers=readers)
    return found


def _cases(wanted: argparse.Namespace) -> Iterator[Case]:
    if wanted.only:
        kind, subject, number = wanted.only.split(":")
        yield kind, subject, int(number)
        return
    # Flips first: they are the quickest.
    for kind, subjects, count in (
        ("flip", list(_kinds), wanted.flips),
        ("kill", wanted.names, wanted.kills),
        ("full", wanted.names, wanted.full),
        ("signal", wanted.names, wanted.signals),
    ):
        yield from ((kind, subjects[number % len(subjects)], number // len(subjects)) for number in range(count))


@contextmanager
def _pool(jobs: int, root: Path) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(jobs, get_context("fork"), _begin, (root / "disk",)) as pool:
        yield pool


def _begin(folder: Path) -> None:
    global _disk
    end_with_parent()
    _disk = Disk.mount(folder)


def _own_disk() -> Disk:
    assert _disk is not None
    return _disk


def _prepare(root: Path, names: Sequence[str]) -> tuple[dict[str, Reference], Path, bool]:
    return *preparation.prepare(root, names, _own_disk()), _own_disk().mounted


def _reader(name: str, finished: Path) -> Reference:
    return cases.make_reference(READERS[name], finished, _own_disk(), runs=1)


def _cut_off(name: str, root: Path) -> Reference:
    return preparation.cut_off(_references[name], root, _own_disk())


def _case(case: Case) -> Outcome:
    kind, subject, number = case
    chance = random.Random(f"{_seed}:{kind}:{subject}:{number}")
    try:
        if kind == "flip":
            return flips.flip(_kinds[subject], number, chance, _own_disk(), _readers)
        return _STRIKES[kind](_references[subject], number, chance, _own_disk())
    except Exception:  # of the drill itself: one case must not end the others
        return Outcome(kind, subject, number, "the drill itself", (traceback.format_exc(),), "failed")


def _tables(outcomes: Sequence[Outcome]) -> str:
    """Return the figures as Markdown."""
    struck = {"kill": ("went on",), "signal": ("SIGINT", "SIGTERM", "SIGHUP"), "full": ("told",)}
    heads = ["stage", "kills", "SIGINT", "SIGTERM", "SIGHUP", "full disk", "failed"]
    rows = _rows([o for o in outcomes if o.kind != "flip"], [how for hows in struck.values() for how in hows])
    lines = [_line(heads), _line(["---", *["---:"] * 6]), *rows, ""]
    heads = ["file", "refused", "made again", "unharmed", "failed"]
    rows = _rows([o for o in outcomes if o.kind == "flip"], heads[1:-1])
    return "\n".join([*lines, _line(heads), _line(["---", *["---:"] * 4]), *rows])


def _rows(outcomes: Sequence[Outcome], hows: Sequence[str]) -> list[str]:
    counts = Counter((outcome.subject, outcome.how) for outcome in outcomes)
    failed = Counter(outcome.subject for outcome in outcomes if outcome.wrong)
    struck = {outcome.subject for outcome in outcomes}
    # A command and what it writes may have one name.
    names = [name for name in dict.fromkeys((*SCENARIOS, *flips.KINDS)) if name in struck]
    rows = [[name, *(counts[name, how] for how in hows), failed[name]] for name in names]
    return [_line(row) for row in [*rows, ["all", *(sum(row[i] for row in rows) for i in range(1, len(hows) + 2))]]]


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _tell(outcome: Outcome) -> None:
    _say(f"FAILED --only '{outcome.kind}:{outcome.subject}:{outcome.case}' ({outcome.told})")
    for what in outcome.wrong:
        _say(f"    {what}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
