"""The measurements of ``benchmarks/quality.py``, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ara.layout_names import DEFAULT_LAYOUT, LayoutName

# Allocators whose result depends on the seed.
LEARNED = ("ara", "ara-paper", "gumbel", "tanh")
# The paper's form uses Adam, with as many steps and windows as tanh and gumbel.
FORMS: dict[str, dict[str, Any]] = {
    "ara": {},
    "ara-paper": {
        "objective": "paper",
        "start": "uniform",
        "steps": 60,
        "batch": 4,
        "learning_rate": 0.2,
        "check_every": 10,
    },
}
# All allocators, in the order in which they are measured.
OURS = ("uniform", "energy", "sensitivity", "ara")
RIVALS = ("ara-paper", "dp-kl", "strs", "tanh", "gumbel")
METHODS = OURS + RIVALS


@dataclass(frozen=True)
class Row:
    """One measurement to make: factors, allocator, budget, seed, layout."""

    factors: str
    method: str
    keep: float
    seed: int
    layout: LayoutName = DEFAULT_LAYOUT

    @property
    def key(self) -> str:
        """Key in the file of finished rows."""
        layout = "" if self.layout == DEFAULT_LAYOUT else f", {self.layout}"
        return f"{self.factors}{layout}/{self.method}/{self.keep:g}/{self.seed}"


def wanted(keeps: list[float], seeds: int) -> Iterator[Row]:
    """List the measurements: first one seed of everything, then further seeds."""
    groups: list[tuple[str, LayoutName, tuple[str, ...], range]] = [
        ("whitened", "factors", ("uniform", "sensitivity"), range(1)),
        ("two-sided", "factors", OURS, range(1)),
        ("two-sided", "pivoted", OURS, range(1)),
        ("two-sided", "factors", RIVALS, range(1)),
        ("two-sided", "factors", ("ara",), range(1, seeds)),
        ("two-sided", "pivoted", ("dp-kl",), range(1)),
        ("two-sided", "pivoted", ("ara",), range(1, seeds)),
        ("two-sided", "factors", tuple(name for name in LEARNED if name != "ara"), range(1, seeds)),
    ]
    for factors, layout, methods, wanted_seeds in groups:
        for seed in wanted_seeds:
            for method in methods:
                for keep in keeps:
                    yield Row(factors, method, keep, seed, layout)
