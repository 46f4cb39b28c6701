"""Second moments of the inputs of layers: whether ``ara decompose`` keeps them, and how later stages find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ara.artifacts.factors import FactorsResults, moment_name, moments_file
from ara.calibration.kept_moments import KeptMoment, KeptMoments
from ara.calibration.moments import InputStats, packed_bytes, packed_triangle
from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.stages.common import Run
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

# Second moments are kept if they take at most this share of the disk that the factors leave free: checkpoints and
# exports of later stages need the rest.
_SHARE = 0.25


def moments_to_keep(
    linears: Sequence[LinearSpec],
    owners: Mapping[str, str],
    wanted: Literal["auto", "yes", "no"],
    free: int,
    stage: StageWriter,
    run: Run,
) -> dict[str, str] | None:
    """Decide whether a decomposition keeps moments; the decision and its bytes are reported.

    Args:
        linears: the layers.
        owners: module path → the first layer of the model with the same input; empty if no text is read.
        wanted: ``auto``: if they take little of the disk.
        free: bytes of the disk that the factors leave.
        stage: with the blocks of an interrupted run.
        run: reporter.

    Returns:
        :attr:`FactorsResults.moments`: module path → the first layer of its block with the same input.

    Raises:
        UsageError: moments are wanted, and the method or an interrupted run has none.
    """
    if not owners:
        if wanted == "yes":
            raise UsageError("--keep-moments yes is given, and this method reads no text", "omit --keep-moments")
        return None
    first: dict[tuple[int, str], str] = {}
    leaders = {spec.name: first.setdefault((spec.layer, owners[spec.name]), spec.name) for spec in linears}
    if stage.finished:
        # All blocks have moments, or none.
        kept = stage.results.get("moments") is not None
        if not kept and wanted == "yes":
            raise UsageError(
                "--keep-moments yes is given, and an interrupted run has finished blocks without moments",
                f"omit it to resume that run, or delete {stage.folder} to start over",
            )
        run.report.fact(f"second moments are {'kept' if kept else 'not kept'}, as in the interrupted run")
        return leaders if kept else None
    if wanted == "no":
        return None
    needed = moment_bytes(linears, leaders)
    size = f"{needed / 2**20:,.0f} MiB"
    if are_kept(needed, wanted, free):
        run.report.fact(f"second moments of their inputs are kept as well: {size} (off: --keep-moments no)")
        return leaders
    run.report.warn(
        f"second moments are not kept: they take {size}, more than {_SHARE:.0%} of the {max(free, 0) / 2**20:,.0f} MiB "
        "that the factors leave free; rounding will read text instead (--keep-moments yes keeps them all the same)"
    )
    return None


def are_kept(size: int, wanted: Literal["auto", "yes", "no"], free: int) -> bool:
    """Tell whether moments of ``size`` bytes are kept; ``wanted`` and ``free`` as of :func:`moments_to_keep`."""
    return wanted == "yes" or (wanted == "auto" and size <= _SHARE * free)


def moment_bytes(linears: Sequence[LinearSpec], leaders: Mapping[str, str]) -> int:
    """Return the bytes of the moments of some layers, in files.

    Args:
        linears: the layers.
        leaders: from :func:`moments_to_keep`.
    """
    return sum(packed_bytes(spec.n) for spec in linears if leaders[spec.name] == spec.name)


def packed_moments(stats: Mapping[str, InputStats], leaders: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the second moments of one block as they are stored.

    Args:
        stats: module path → statistics of its inputs.
        leaders: from :func:`moments_to_keep`.
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
