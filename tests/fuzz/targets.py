"""Every kind of foreign input, how it is spoilt, and the commands that read it.

A target is a function of a seeded random generator and of the valid files, registered with its share of the cases.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.fuzz import commands, models, results, texts
from tests.fuzz.harness import Case
from tests.fuzz.registry import TARGETS
from tests.fuzz.workspaces import Seeds

__all__ = ["TARGETS", "make_case", "weighted"]
# Imported because they register their targets.
_MODULES = (models, texts, results, commands)


def make_case(name: str, seed: int, index: int, seeds: Seeds) -> Case:
    """Return a case of a target: the same one for the same seed and index."""
    rng = random.Random(f"{name}/{seed}/{index}")
    case = TARGETS[name].make(rng, seeds)
    # Only what a program can be called with: no NUL, and bytes that are no UTF-8 as Python shows them.
    case.argv = [_as_argument(word) for word in case.argv]
    if rng.random() < 0.1 and "--json" not in case.argv and not {"--help", "--"} & set(case.argv):
        case.argv.append("--json")
    return case


def _as_argument(word: str) -> str:
    return word.replace("\x00", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def weighted(names: Sequence[str]) -> list[str]:
    """Return the names so often as they weigh, spread evenly: one round of cases."""
    places: list[tuple[float, str]] = []
    for name in names:
        weight = TARGETS[name].weight
        places += [((index + 0.5) / weight, name) for index in range(weight)]
    return [name for _, name in sorted(places)]
