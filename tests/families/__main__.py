"""Probes architectures and writes ``ara/models/families.json``; see the package."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

# Before torch is imported: only a process with a single thread can be forked.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import transformers

from ara.models.families import DATA, Families, Family, Table, known_families
from tests.families.pool import Probed, probe_all
from tests.families.probe import architectures

# Seconds of processor time for one family.
_ALLOWED = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe all model types, or those named; returns 1 if one neither works, nor is refused, nor cannot be built."""
    wanted = _arguments(arguments)
    import_libraries()
    begun, found = time.monotonic(), dict[Table, list[Family]]()
    for table in get_args(Table):
        kinds = {kind: name for kind, name in architectures(table).items() if not wanted.kinds or kind in wanted.kinds}
        found[table] = []
        for probed in probe_all(kinds, wanted.jobs, wanted.seconds):
            found[table].append(_checked(probed))
            _say(found[table][-1], probed.seconds, wanted.verbose)
    outcomes = Counter(family.outcome for families in found.values() for family in families)
    seconds = time.monotonic() - begun
    print(
        ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), f"in {seconds:.0f} s", file=sys.stderr
    )
    _write(found, wanted.output, kept=bool(wanted.kinds))
    return 1 if outcomes["fails"] else 0


def import_libraries() -> None:
    """Import what every process needs, so that it is there after a fork."""
    for module in ("decompose", "allocate", "truncate"):
        importlib.import_module(f"ara.stages.{module}")
    for name in ("transformers.models.llama.modeling_llama", "ara.allocation.sensitivity", "ara.data.textfiles"):
        importlib.import_module(name)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.families", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE", help="only these; the other results are kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=120, help="elapsed time after which a process is ended")
    parser.add_argument("--output", type=Path, default=DATA, metavar="FILE", help="to write [default: %(default)s]")
    parser.add_argument("--verbose", action="store_true", help="also print kinds of layers, and what stays dense")
    wanted = parser.parse_args(arguments)
    known = {kind for table in get_args(Table) for kind in architectures(table)}
    if unknown := [kind for kind in wanted.kinds if kind not in known]:
        parser.error(f"transformers {transformers.__version__} has no model type {', '.join(unknown)} in its tables")
    return wanted


def _checked(probed: Probed) -> Family:
    """Return what came out; a family that took too long fails."""
    if probed.seconds <= _ALLOWED:
        return probed.family
    reason = f"took {probed.seconds:.1f} s of processor time; {_ALLOWED} are allowed"
    return replace(probed.family, outcome="fails", reason=reason)


def _say(family: Family, seconds: float, verbose: bool) -> None:
    print(f"{family.outcome:9} {seconds:4.1f} s  {family.model_type}  {family.reason}", flush=True)
    if verbose:
        print(f"    factorised: {', '.join(family.kinds)}\n    dense: {', '.join(family.dense)}", flush=True)


def _write(found: Mapping[Table, Sequence[Family]], path: Path, kept: bool) -> None:
    """Write the results; with ``kept``, those of other model types stay."""
    tables: dict[Table, dict[str, Family]] = {table: {} for table in found}
    if kept:
        known = known_families()
        tables = {"language": _by_type(known.language), "multimodal": _by_type(known.multimodal)}
    for table, families in found.items():
        tables[table] |= _by_type(families)
    whole = Families(
        transformers.__version__,
        **{table: tuple(families[kind] for kind in sorted(families)) for table, families in tables.items()},
    )
    path.write_text(json.dumps(whole.as_dict(), indent=1) + "\n", encoding="utf-8")


def _by_type(families: Sequence[Family]) -> dict[str, Family]:
    return {family.model_type: family for family in families}


if __name__ == "__main__":
    # Many old families warn about things that no tiny model needs.
    warnings.simplefilter("ignore")
    sys.exit(main())
