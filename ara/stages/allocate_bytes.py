"""``ara allocate --size``: ranks and bits under one budget of bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ara.allocation.guard import Verdict, verdict_of
from ara.allocation.joint import Rounder, best_choices
from ara.artifacts.factors import FactorsResults
from ara.artifacts.ranks import SizeResults
from ara.config import AllocateConfig
from ara.config.sizes import bytes_in
from ara.errors import UsageError
from ara.layouts.grid import Grid
from ara.masks.sensitivity_table import sensitivity_table
from ara.models.weights import LinearSpec, matching
from ara.solver.problem import Allocation, Budget
from ara.stages.common import Run
from ara.stages.modules import load_modules
from ara.stages.tuning import open_tuning_context
from ara.workspace.store import Workspace
from ara.workspace.view import StageView

JOINT = "joint"
# Bytes of a tensor's entry in the header of a weight file, and tensors of a layer, about.
_HEADER, _TENSORS = 130, 6


def allocate_bytes(
    config: AllocateConfig,
    decomposition: StageView,
    workspace: Workspace,
    run: Run,
) -> tuple[Allocation, Verdict | None, SizeResults]:
    """Choose rank and bits of every layer; the guard compares with one width for all, dense or at chosen ranks.

    Args:
        config: with a size, and with resolved device and dtype.
        decomposition: the factors.
        workspace: for the caches.
        run: reporter.

    Raises:
        UsageError: the size is too small.
    """
    assert config.size is not None
    modules = load_modules(decomposition, config.layout)
    specs = [module.spec for module in modules]
    grids: dict[int, Grid] = {bits: Grid(bits, config.block, config.zero_points) for bits in config.bits if bits != 16}
    widths = tuple(dict.fromkeys(specs[0].bits if bits == 16 else bits for bits in sorted(config.bits, reverse=True)))
    limit, others = int(bytes_in(config.size)), _other_bytes(decomposition, specs)
    if others >= limit:
        raise UsageError(
            f"embeddings, norms and headers alone take {others:,} bytes, --size {config.size} allows {limit:,}",
            "allow a larger --size",
        )

    def budget(bits: tuple[int, ...]) -> Budget:
        limits: Any = (config.rank_multiple, config.min_rank, config.min_keep, matching(specs, config.exclude))
        return Budget.for_bytes(specs, limit - others, grids, bits, *limits)

    everything = budget(widths)
    context = open_tuning_context(decomposition, specs, config, workspace, run)
    tables = sensitivity_table(context).losses
    context.model.use_dense()
    rounder = Rounder(context, grids)
    shares = rounder.shares()
    chosen = Allocation.from_picks(specs, best_choices(modules, tables, shares, everything), everything)
    verdict = None
    if config.guard:
        candidates = {JOINT: chosen}
        for bits in widths if len(widths) > 1 else ():
            if (dense := _dense(specs, bits, everything)) is not None:
                candidates[f"dense, {bits} bits"] = dense
            try:
                alone = budget((bits,))
            except UsageError:
                continue
            picks = best_choices(modules, tables, shares, alone)
            candidates[f"ranks, {bits} bits"] = Allocation.from_picks(specs, picks, alone)
        verdict = verdict_of(candidates, rounder.losses(candidates))
        shown = ", ".join(f"{name} {verdict.held_out[name]:.4f}" for name in ("dense", *candidates))
        run.report.fact(f"held-out negative log-likelihood, nats per token: {shown}")
        if verdict.winner != JOINT:
            run.report.warn(
                f"{verdict.winner} is better than {JOINT} on held-out text and is used instead (off: --no-guard)"
            )
        chosen = candidates[verdict.winner]
    counts = Counter(str(choice.bits) for choice in chosen.choices.values())
    size = SizeResults(limit, chosen.cost, others, dict(sorted(counts.items())), config.block, config.zero_points)
    return chosen, verdict, size


def _dense(specs: list[LinearSpec], bits: int, budget: Budget) -> Allocation | None:
    """Return all layers dense at one width, if that fits."""
    picks = [
        next(at for at, one in enumerate(budget.choices(spec)) if one.rank is None and one.bits == bits)
        for spec in specs
    ]
    found = Allocation.from_picks(specs, picks, budget)
    return found if found.cost <= budget.limit else None


def _other_bytes(decomposition: StageView, specs: list[LinearSpec]) -> int:
    """Return the bytes of all that is not a factorised layer, with the headers of the weight files."""
    parameters = FactorsResults.read(decomposition).model_parameters - sum(spec.dense_cost for spec in specs)
    return parameters * specs[0].bits // 8 + _HEADER * _TENSORS * len(specs)
