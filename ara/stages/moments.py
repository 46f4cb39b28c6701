"""Second moments of the inputs of layers: whether ``ara decompose`` keeps them, and how later stages find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ara.artifacts.factors import FactorsResults, moment_name, moments_file
from ara.calibration.kept_moments import KeptMoment, KeptMoments
from ara.calibration.moments import InputStats, packed_triangle
from ara.models.weights import LinearSpec
from ara.stages.common import Run
from ara.workspace.view import StageView

# Second moments are kept if they take at most this share of the disk that the factors leave free: checkpoints and
# exports of later stages need the rest.
_SHARE = 0.25


def moment_leaders(linears: Sequence[LinearSpec], owners: Mapping[str, str]) -> dict[str, str]:
    """Return module path → the first layer of its block with the same input."""
    first: dict[tuple[int, str], str] = {}
    return {spec.name: first.setdefault((spec.layer, owners[spec.name]), spec.name) for spec in linears}


def room_for_moments(linears: Sequence[LinearSpec], leaders: Mapping[str, str], free: int, run: Run) -> bool:
    """Tell whether the moments take little enough of the free disk, and report it.

    Args:
        linears: the layers.
        leaders: from :func:`moment_leaders`.
        free: bytes that the factors leave.
        run: reporter.
    """
    widths = {spec.name: spec.n for spec in linears}
    needed = sum(4 * (widths[name] * (widths[name] + 1) // 2) for name in set(leaders.values()))
    size = f"{needed / 2**20:,.0f} MiB"
    if needed <= _SHARE * free:
        run.report.fact(f"second moments of their inputs are kept as well: {size} (off: --no-keep-moments)")
        return True
    run.report.warn(
        f"second moments are not kept: they take {size}, more than {_SHARE:.0%} of the "
        f"{max(free, 0) / 2**20:,.0f} MiB that the factors leave free; rounding will read text instead"
    )
    return False


def packed_moments(stats: Mapping[str, InputStats], leaders: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the second moments of one block as they are stored.

    Args:
        stats: module path → statistics of its inputs.
        leaders: from :func:`moment_leaders`.
    """
    return {
        moment_name(name): packed_triangle(found.second_moment).cpu()
        for name, found in stats.items()
        if leaders[name] == name
    }


def kept_moments(decomposition: StageView, run: Run) -> KeptMoments | None:
    """Return the second moments that a decomposition has kept; ``None`` if it has none. Either is reported."""
    results = FactorsResults.read(decomposition)
    if results.moments is None:
        run.report.fact(f"{decomposition.key} has kept no second moments: text is read for them")
        return None
    run.report.fact(f"second moments of inputs: those of {decomposition.key}, no text is read for them")
    return KeptMoments(
        {
            layer.name: KeptMoment(
                decomposition.path / moments_file(layer.layer), moment_name(results.moments[layer.name]), layer.n
            )
            for layer in results.modules
        }
    )
