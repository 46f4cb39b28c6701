"""The register of targets: kinds of foreign input."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.harness import Case
from tests.fuzz.workspaces import Seeds

Make = Callable[[random.Random, Seeds], Case]


@dataclass(frozen=True)
class Target:
    """One kind of foreign input.

    Attributes:
        name: as the command line of the fuzzer takes it.
        weight: its share of the cases; what is slow has a small one.
        make: returns a case; a function of the generator and the valid files alone.
    """

    name: str
    weight: int
    make: Make


TARGETS: dict[str, Target] = {}


def target(name: str, weight: int) -> Callable[[Make], Make]:
    """Register a target."""

    def register(make: Make) -> Make:
        TARGETS[name] = Target(name, weight, make)
        return make

    return register
