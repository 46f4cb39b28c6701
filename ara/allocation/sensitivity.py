"""Sensitivity allocation: the loss of every rank from one backward pass, then an exact knapsack with dense for choice.

See :mod:`ara.masks.sensitivity` for the table. No training: it is ARA's start, and a method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from ara.allocation.allocation import Allocation, Module
from ara.allocation.base import Allocator, Context
from ara.allocation.budget import Budget
from ara.allocation.optimum import best_ranks
from ara.decomposition.base import MethodOptions
from ara.masks.sensitivity import sensitivity_tables
from ara.masks.table_cache import SensitivityTable, timed


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
    sizes = {spec.name: spec.full_rank + 1 for spec in context.model.specs}
    return context.table_cache.get(context.train, settings, sizes, lambda: timed(make))
