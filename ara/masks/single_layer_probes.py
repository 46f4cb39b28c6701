"""Single-layer probes: the loss with one layer cut and all others dense.

The dense model runs once and the outputs of all blocks are kept. A probe of a layer in block l starts at block l, with
the dense output of block l − 1 (:mod:`ara.models.blocks`). On average it runs half of the blocks.
This is only correct if the output of the previous block is all that a block uses. A dense pass from each block checks
it. Where it fails (Gemma 3n and 4 use the keys and values of an earlier block), the whole model runs.
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
from ara.models.likelihood import scores_nll
from ara.models.scores import KEPT_BYTES, Scores
from ara.models.weights import LinearSpec, find_blocks
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.context import TuningContext
    from ara.solver.problem import Budget

Measure = Literal["kl", "nll"]

# Allowed difference of two dense passes, nats per token: far below the effect of a cut, far above rounding errors.
_SAME = 1e-4


@torch.no_grad()
def probe(
    model: MaskedModel,
    windows: torch.Tensor,
    ranks: Mapping[str, Sequence[int]],
    measure: Measure,
    report: Reporter = SILENT,
) -> dict[str, list[float]]:
    """Return the loss with one layer cut to one rank and all others dense, for all ``ranks``.

    All windows form one batch. Memory: the block outputs, blocks · w · t · hidden numbers (SmolLM2-135M in bfloat16, 2
    windows of 512 tokens: 34 MiB), and for ``kl`` the dense logits if they are small.

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
        model.prepare(windows)
        with keeping_outputs(blocks) as outputs:
            dense = model.scores(windows)
        teacher = dense.kept(KEPT_BYTES) if measure == "kl" else None
        expected = 0.0 if measure == "kl" else scores_nll(dense, windows.to(model.device)).mean().item()
        del dense
        inputs = [None, *outputs[:-1]] if len(outputs) == len(blocks) else [None] * len(blocks)
        whole = 0
        with report.bar("Probing layers", sum(len(wanted) for wanted in ranks.values())) as bar:
            for index, before in enumerate(inputs):
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
                f"{whole} of {len(blocks)} blocks were probed by passes through the whole model, which takes longer: "
                "they use values computed by earlier blocks"
            )
    finally:
        model.use_dense()
    return losses


class ProbeOptions(MethodOptions):
    """Options of the methods that use single-layer probes."""

    ratios: int = Field(
        5, ge=1, le=64, description="parameter ratios probed per layer, evenly spaced from the least rank"
    )
    windows: int = Field(2, ge=1, le=64, description="calibration windows per probe, read in one batch")


def probe_choices(
    context: TuningContext, specs: Sequence[LinearSpec], budget: Budget, options: ProbeOptions, measure: Measure
) -> list[dict[int, float]]:
    """Probe some of the ranks that a budget offers, on the first ``options.windows`` training windows.

    For i = 0 … ratios − 1 it is the largest rank with at most i/ratios of the layer's parameters, or the least rank.

    Returns:
        Per layer, index into ``budget.choices(spec)`` → loss; see :func:`probe`. Dense is not among them.
    """
    points = [_points(spec, budget, options.ratios) for spec in specs]
    ranks = {spec.name: list(at.values()) for spec, at in zip(specs, points, strict=True)}
    losses = probe(context.model, context.train[: options.windows], ranks, measure, context.report)
    return [dict(zip(at, losses[spec.name], strict=True)) for spec, at in zip(specs, points, strict=True)]


def _points(spec: LinearSpec, budget: Budget, ratios: int) -> dict[int, int]:
    """Return the choices to probe, as index → rank; empty for a layer that can only be dense."""
    choices = budget.rank_choices(spec)
    ranks = [choice.rank for choice in choices if choice.rank is not None]
    costs = [choice.cost for choice in choices[: len(ranks)]]
    fits = (bisect_right(costs, choices[-1].cost * i / ratios) for i in range(ratios))
    return {at: ranks[at] for at in sorted({max(count - 1, 0) for count in fits})} if ranks else {}


def _loss(model: MaskedModel, windows: torch.Tensor, teacher: Scores | None, what: str) -> float:
    """Return the mean NLL, or KL to the ``teacher``, of the current cut; ``what`` names it in errors."""
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
    teacher: Scores | None,
    expected: float,
) -> bool:
    """Tell whether the dense model has the loss ``expected`` when the pass starts at block ``start``."""
    try:
        with starting_at(blocks, start, output):
            loss = _loss(model, windows, teacher, "no layer")
    except Exception as error:  # a block that lacks values of earlier blocks may raise anything
        if is_out_of_memory(error):
            raise
        return False
    return abs(loss - expected) <= _SAME
