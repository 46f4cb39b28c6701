"""The measurements of ``benchmarks/recovery.py``, in their order, and their summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ara.layout_names import LayoutName

# Texts that the factors, ranks and repairs read, as in --text. "mixed" is ARA's default for chat models.
CALIBRATIONS = {"mixed": "c4:0.8,chat:0.2", "c4": "c4"}
RANKS = ("ara", "uniform")
# Learned ranks of layers in two factors; all others are pivoted.
FACTORS = "ara-factors"
LEVELS = ("frozen", "closed", "block", "distill")
# Distillation without the training of blocks before it.
DIRECT = "closed+distill"
# In the order of the tables.
ORDER = (*LEVELS[:-1], DIRECT, LEVELS[-1])


@dataclass(frozen=True)
class Row:
    """One measurement: calibration text, ranks, budget, seed of ranks and repair, level of recovery.

    ``ranks`` is one of :data:`RANKS`, pivoted, or :data:`FACTORS`. ``level`` is one of :data:`ORDER`.
    """

    calibration: str
    ranks: str
    keep: float
    seed: int
    level: str

    @property
    def method(self) -> str:
        """Allocator."""
        return self.ranks.removesuffix("-factors")

    @property
    def layout(self) -> LayoutName:
        """Of the low-rank layers."""
        return "factors" if self.ranks == FACTORS else "pivoted"

    @property
    def repairs(self) -> tuple[str, ...]:
        """Levels that are run one after the other."""
        return tuple(DIRECT.split("+")) if self.level == DIRECT else LEVELS[1 : LEVELS.index(self.level) + 1]

    @property
    def key(self) -> str:
        """Key in the file of finished rows."""
        return f"{self.calibration}/{self.ranks}/{self.keep:g}/{self.seed}/{self.level}"


def wanted(keeps: list[float], seeds: int) -> Iterator[Row]:
    """List the measurements: one seed of everything, then, at keep 0.6, raw text, two factors and further seeds."""
    groups = [("mixed", ranks, keep, 0) for keep in keeps for ranks in RANKS]
    if 0.6 in keeps:
        groups += [("c4", "ara", 0.6, 0), ("mixed", FACTORS, 0.6, 0)]
        groups += [("mixed", ranks, 0.6, seed) for seed in range(1, seeds) for ranks in RANKS]
    for group in groups:
        for level in ORDER:
            yield Row(*group, level)


def reference(calibration: str, keep: float) -> str:
    """Return the key of the uniform, whitened, unrepaired model, where the gap is fully open."""
    return f"{calibration}/whitened/{keep:g}"


def gap_closed(rows: Mapping[str, Any], row: Row, text: str) -> float | None:
    """Return (ln uniform − ln ppl) / (ln uniform − ln dense) of a row on a text; ``None`` if a part is missing."""
    keys = (row.key, reference(row.calibration, row.keep), "dense")
    if any(key not in rows for key in keys):
        return None
    own, uniform, dense = (float(rows[key]["texts"][text]) for key in keys)
    return (uniform - own) / (uniform - dense)
