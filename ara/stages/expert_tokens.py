"""Warns of experts that saw too few calibration tokens for their second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ara.calibration.moments import InputStats
from ara.models.weights import LinearSpec
from ara.progress import Reporter

# Blocks that the warning names.
_NAMED = 3


class ExpertTokens:
    """Counts the tokens of every expert, block by block."""

    def __init__(self) -> None:
        # Block → tokens of its experts, those of the widest input.
        self._counts: dict[int, dict[int, list[int]]] = {}

    def add(self, layers: Sequence[LinearSpec], owners: Mapping[str, str], inputs: Mapping[str, InputStats]) -> None:
        """Note what the experts among some layers have seen.

        Args:
            layers: of whole blocks.
            owners: layer → the layer whose statistics it has.
            inputs: the statistics that this process has.
        """
        for spec in layers:
            if spec.pool is not None and (stats := inputs.get(owners.get(spec.name, ""))) is not None:
                self._counts.setdefault(spec.layer, {}).setdefault(spec.n, []).append(stats.tokens)

    def warn(self, report: Reporter) -> None:
        """Name the blocks with experts that saw fewer tokens than their inputs are wide."""
        found = []
        width = 0
        for layer, by_width in sorted(self._counts.items()):
            widest = max(by_width)
            tokens = by_width[widest]
            if few := [count for count in tokens if count < widest]:
                found.append(f"block {layer + 1} ({len(few)} of {len(tokens)}, the least {min(few):,})")
                width = max(width, widest)
        if not found:
            return
        more = f" and {len(found) - _NAMED} more blocks" if len(found) > _NAMED else ""
        report.warn(
            f"experts saw fewer calibration tokens than their inputs are wide ({width:,}): "
            f"{', '.join(found[:_NAMED])}{more}; more --samples help, or --calibrate-all-experts"
        )
