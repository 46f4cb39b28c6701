"""Sensitivity allocation: the loss of every rank from one backward pass, then an exact knapsack with dense for choice.

See :mod:`ara.masks.sensitivity` for the table. No training: it is ARA's start, and a method of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from ara.allocation.base import Allocation, Allocator, Context, Module
from ara.allocation.budget import Budget
from ara.allocation.knapsack import exact_minimise
from ara.decomposition.base import MethodOptions
from ara.masks.sensitivity import sensitivity_tables
from ara.masks.table_cache import SensitivityTable, timed
from ara.models.linears import LinearSpec


class SensitivityOptions(MethodOptions):
    """Options of the sensitivity table."""

    targets: Literal["model", "text"] = Field(
        "model", description="gradients of the loss against tokens drawn from the model (Fisher) or the text's own"
    )
    sums: Literal["token", "window"] = Field("token", description="square effects per token, or summed per window")


class Sensitivity(Allocator):
    """Least summed loss by the sensitivity table."""

    Options = SensitivityOptions
    needs_model = True

    def allocate(self, modules: Sequence[Module], budget: Budget, context: Context | None = None) -> Allocation:
        """Read the table off the dense model and solve the knapsack."""
        assert context is not None and isinstance(self.options, SensitivityOptions)
        return best_ranks([m.spec for m in modules], sensitivity_of(context, self.options).losses, budget)


def sensitivity_of(context: Context, options: SensitivityOptions) -> SensitivityTable:
    """Return the table of the dense model, that of ``context.table_cache`` if there is one."""

    def make() -> dict[str, torch.Tensor]:
        context.model.use_dense()
        return sensitivity_tables(
            context.model,
            context.train,
            loss="fisher" if options.targets == "model" else "ce",
            per_window=options.sums == "window",
            batch_size=context.batch_size,
            seed=context.seed,
            report=context.report,
        )

    if context.table_cache is None:
        return timed(make)
    settings: dict[str, str | int] = {
        **options.model_dump(),
        "batch_size": context.batch_size,
        "seed": context.seed,
        "device": str(context.model.device),
        "dtype": str(context.model.model.dtype),
    }
    return context.table_cache.get(context.train, settings, lambda: timed(make))


def best_ranks(specs: Sequence[LinearSpec], tables: Mapping[str, torch.Tensor], budget: Budget) -> Allocation:
    """Return the allocation of least summed loss under the budget.

    Args:
        specs: the layers.
        tables: module path → (r + 1) float64, the loss of keeping k components; the last entry is
            that of dense.
        budget: the limit.
    """
    choices = [budget.choices(spec) for spec in specs]
    losses = [
        tables[spec.name][[spec.full_rank if rank is None else rank for rank, _ in options]]
        for spec, options in zip(specs, choices, strict=True)
    ]
    picks = exact_minimise(specs, losses, budget)
    return Allocation.from_picks(specs, picks, budget)
