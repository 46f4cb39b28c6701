"""The mask families of ARA and their starting points, for ``ara train-masks`` and ``--method ara``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ara.config import MaskTrainingOptions
from ara.errors import UsageError
from ara.layout_names import LayoutName
from ara.masks.newton import NewtonMasks
from ara.masks.paper import PaperStaircase, shares_of, start_at
from ara.masks.priced import PricedStaircase
from ara.masks.rank_losses import LearnedLosses
from ara.masks.staircase import paper_atoms, priced_atoms
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Budget, Module

Tables = Mapping[str, torch.Tensor]
AraFamily = NewtonMasks | PricedStaircase | PaperStaircase


def check_layout(options: MaskTrainingOptions, layout: LayoutName) -> None:
    """Check that the paper's form supports the layout.

    Raises:
        UsageError: it does not: its gain function jumps at k(m + n) = mn, and the gain in this layout does not.
    """
    if options.objective == "paper" and layout not in PaperStaircase.layouts:
        raise UsageError(
            f"--objective paper and --layout {layout} are both given: the paper's form counts k(m + n) parameters",
            f"use --objective priced, or --layout {PaperStaircase.layouts[0]}",
        )


def needs_table(options: MaskTrainingOptions) -> bool:
    """Tell whether a training needs the sensitivity table: as its start, or for its curvature."""
    return options.start == "sensitivity" or (options.objective == "priced" and options.optimiser == "newton")


def ara_family(
    options: MaskTrainingOptions,
    modules: Sequence[Module],
    budget: Budget,
    table: Tables | None,
    learned: LearnedLosses | None = None,
) -> AraFamily:
    """Return masks at their start.

    Args:
        options: form and settings.
        modules: the layers.
        budget: the limit.
        table: the sensitivity table; may be ``None`` if :func:`needs_table` is false.
        learned: start from this result of the priced form at another budget instead.
    """
    specs = [module.spec for module in modules]
    check_layout(options, specs[0].layout)
    start: Tables = even_tables(specs)
    around = None
    if learned is not None:
        assert learned.tables is not None
        start, around = learned.tables, learned.ranks
    elif options.start == "sensitivity":
        assert table is not None
        start = table
    if options.objective == "priced":
        if options.optimiser == "newton":
            assert table is not None
            return NewtonMasks(specs, budget, start, table, options.rate, options.trust, options.damping, around)
        return PricedStaircase(priced_atoms(specs, budget, options.atoms), budget, start, options.temperature)
    atoms = paper_atoms(specs, options.atoms)
    return PaperStaircase(
        atoms,
        {module.spec.name: module.spectrum for module in modules},
        budget,
        start_at(atoms, shares_of(specs, best_ranks(specs, start, budget).ranks)),
        options.budget_weight,
        options.guidance_weight,
    )


def even_tables(specs: Sequence[LinearSpec]) -> dict[str, torch.Tensor]:
    """Return losses whose optimum is the same share R of all layers: ½ (1 − R)² mn / Σ mn up to R = 1; (r + 1) each."""
    tables, total = {}, sum(spec.dense_cost for spec in specs)
    for spec in specs:
        share = spec.cost(torch.arange(spec.full_rank + 1, dtype=torch.float64)) / spec.dense_cost
        tables[spec.name] = 0.5 * spec.dense_cost / total * (1 - share).clamp_min(0).square()
        tables[spec.name][-1] = 0
    return tables
