"""Probes: the loss with a single layer cut and all others dense.

The dense model runs once and the output of every block is kept. A probe of a layer of block l starts at block l, from
what block l − 1 gave the dense model (:mod:`ara.models.blocks`): it runs half of the blocks on average.
That asks of a block that it sees nothing of the blocks before but the output of the last. Where it sees more (the keys
and values of an earlier block, in Gemma 3n and 4), the whole model runs: a dense run tells, block by block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ara.config import MethodOptions
from ara.errors import NumericalError, is_out_of_memory
from ara.masks.model import MaskedModel
from ara.models.blocks import keeping_outputs, starting_at
from ara.models.likelihood import window_nll
from ara.models.weights import LinearSpec, find_blocks
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.context import TuningContext
    from ara.solver.problem import Budget

Measure = Literal["kl", "nll"]

# Nats per token that two runs of the dense model may differ by: far below any cut, far above rounding.
_SAME = 1e-4


@torch.no_grad()
def probe(
    model: MaskedModel,
    windows: torch.Tensor,
    ranks: Mapping[str, Sequence[int]],
    measure: Measure,
    report: Reporter = SILENT,
) -> dict[str, list[float]]:
    """Return the loss with one layer cut at one rank and all others dense, for every layer and rank asked for.

    All windows go through in one batch. Kept in memory: the block outputs, blocks · w · t · hidden numbers, and for
    ``kl`` the dense logits, w · t · vocabulary (SmolLM2-135M in bfloat16, 2 windows of 512 tokens: 34 and 96 MiB).

    Args:
        model: left dense.
        windows: (w, t) int64.
        ranks: module path → ranks to probe.
        measure: ``kl``, the divergence KL(dense ‖ cut); ``nll``, the negative log-likelihood of the text.
        report: progress.

    Returns:
        Module path → one loss per rank, mean over the windows, nats per predicted token.

    Raises:
        NumericalError: a loss is NaN or infinite.
    """
    blocks = list(find_blocks(model.model)[1])
    layer_of = {spec.name: spec.layer for spec in model.specs}
    losses: dict[str, list[float]] = {name: [] for name in ranks}
    model.use_dense()
    try:
        with keeping_outputs(blocks) as outputs:
            dense = model.logits(windows)
        teacher = dense if measure == "kl" else None
        expected = 0.0 if measure == "kl" else window_nll(dense, windows.to(dense.device)).mean().item()
        del dense
        befores = [None, *outputs[:-1]] if len(outputs) == len(blocks) else [None] * len(blocks)
        whole = 0
        with report.bar("Probing layers", sum(len(wanted) for wanted in ranks.values())) as bar:
            for index, before in enumerate(befores):
                start = index if before is not None else 0
                if start and not _same_from(start, before, blocks, model, windows, teacher, expected):
                    start = 0
                    whole += 1
                with starting_at(blocks, start, before):
                    for name in (name for name in ranks if layer_of[name] == index):
                        for rank in ranks[name]:
                            model.use({name: rank})
                            losses[name].append(_loss(model, windows, teacher, f"{name} at rank {rank}"))
                            bar.advance()
                        model.use({name: None})
        if whole:
            report.fact(
                f"{whole} of {len(blocks)} blocks were probed by whole passes, which takes longer: later blocks reuse "
                "what earlier ones compute"
            )
    finally:
        model.use_dense()
    return losses


class ProbeOptions(MethodOptions):
    """Options of the methods that cut every layer alone."""

    ratios: int = Field(
        5, ge=1, le=64, description="parameter ratios probed per layer, evenly spaced from the least rank"
    )
    windows: int = Field(2, ge=1, le=64, description="calibration windows per probe, read in one batch")


def probe_choices(
    context: TuningContext, specs: Sequence[LinearSpec], budget: Budget, options: ProbeOptions, measure: Measure
) -> list[dict[int, float]]:
    """Probe some of the ranks that a budget offers, on the first ``options.windows`` training windows.

    Per layer: for i = 0 … ratios − 1 the largest rank that keeps at most i/ratios of its parameters, or the least rank.

    Returns:
        Per layer, index into ``budget.choices(spec)`` → loss; see :func:`probe`. Dense is not among them.
    """
    points = [_points(spec, budget, options.ratios) for spec in specs]
    ranks = {spec.name: list(at.values()) for spec, at in zip(specs, points, strict=True)}
    losses = probe(context.model, context.train[: options.windows], ranks, measure, context.report)
    return [dict(zip(at, losses[spec.name], strict=True)) for spec, at in zip(specs, points, strict=True)]


def _points(spec: LinearSpec, budget: Budget, ratios: int) -> dict[int, int]:
    """Return the choices to probe, as index → rank; empty for a layer that no rank makes cheaper."""
    choices = budget.rank_choices(spec)
    ranks = [choice.rank for choice in choices if choice.rank is not None]
    costs = [choice.cost for choice in choices[: len(ranks)]]
    fits = (bisect_right(costs, choices[-1].cost * i / ratios) for i in range(ratios))
    return {at: ranks[at] for at in sorted({max(count - 1, 0) for count in fits})} if ranks else {}


def _loss(model: MaskedModel, windows: torch.Tensor, teacher: torch.Tensor | None, what: str) -> float:
    """Return the mean NLL, or KL to the ``teacher`` (w, t, v), of the present cut; ``what`` names it in errors."""
    values = model.nll(windows, len(windows)) if teacher is None else model.kl(windows, teacher)
    value = values.mean().item()
    if not math.isfinite(value):
        raise NumericalError(
            f"with {what} the loss is {value}", "the model computes NaN or infinity: try --dtype float32"
        )
    return value


def _same_from(
    start: int,
    output: Any,
    blocks: Sequence[nn.Module],
    model: MaskedModel,
    windows: torch.Tensor,
    teacher: torch.Tensor | None,
    expected: float,
) -> bool:
    """Tell whether the dense model still gives the loss ``expected`` when passes start at block ``start``."""
    try:
        with starting_at(blocks, start, output):
            found = _loss(model, windows, teacher, "no layer")
    except Exception as error:  # whatever a block says that does not find what it looks for
        if is_out_of_memory(error):
            raise
        return False
    return abs(found - expected) <= _SAME
