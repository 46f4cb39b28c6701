"""The guard: candidate allocations are compared on held-out calibration text, and the best one is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ara.errors import NumericalError
from ara.masks.context import TuningContext
from ara.solver.problem import Allocation


@dataclass(frozen=True)
class Verdict:
    """Result of the comparison.

    Attributes:
        winner: name of the best candidate.
        held_out: mean negative log-likelihood of every candidate and of ``dense``, nats per token.
        stderr: standard error over windows of each candidate's difference to the winner, nats per token.
    """

    winner: str
    held_out: Mapping[str, float]
    stderr: Mapping[str, float | None]


def compare_candidates(candidates: Mapping[str, Allocation], context: TuningContext) -> Verdict:
    """Read the held-out windows with every candidate; the first candidate wins a tie, and NaN never wins.

    Args:
        candidates: by name, in order of preference; at least one.
        context: the model and the text; the model is left dense.

    Raises:
        NumericalError: no candidate gives a finite loss.
    """
    model, windows = context.model, context.held_out
    model.use_dense()
    values = {"dense": model.nll(windows, context.batch_size)}
    seen: list[tuple[Allocation, str]] = []
    try:
        for name, allocation in candidates.items():
            same = next((other for known, other in seen if known == allocation), None)
            if same is None:
                model.use(allocation.ranks)
                values[name] = model.nll(windows, context.batch_size, context.report, f"Reading held-out text: {name}")
                seen.append((allocation, name))
            else:
                values[name] = values[same]
    finally:
        model.use_dense()
    return verdict_of(candidates, values)


def verdict_of(candidates: Collection[str], values: Mapping[str, torch.Tensor]) -> Verdict:
    """Compare losses that were measured.

    Args:
        candidates: names in order of preference.
        values: losses of the windows (w), of every candidate and of ``dense``.

    Raises:
        NumericalError: no candidate has a finite loss.
    """
    means = {name: float(found.mean()) for name, found in values.items()}
    count = len(values["dense"])
    winner = min(candidates, key=lambda name: means[name] if means[name] == means[name] else math.inf)
    if not math.isfinite(means[winner]):
        raise NumericalError(
            f"all candidates give a held-out loss of NaN or infinity: {', '.join(candidates)}",
            "try --dtype float32 or a higher --keep",
        )
    spread = {
        name: float((values[name] - values[winner]).std() / count**0.5) if count > 1 else None for name in candidates
    }
    return Verdict(winner, means, spread)
