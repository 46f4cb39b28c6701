"""Allocations for a size in bytes, of everything that may be chosen or of a part of it; measured once for all sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.forms import Form
from ara.allocation.joint import Rounder, best_choices
from ara.config import BudgetConfig
from ara.layouts.grid import Grid
from ara.masks.sensitivity_table import sensitivity_table
from ara.models.weights import LinearSpec, matching
from ara.solver.problem import Allocation, Budget, Choice, Module


class SizedAllocator:
    """Chooses ranks and bits by the estimates of :mod:`ara.allocation.joint`.

    Attributes:
        specs: the layers.
        rounder: rounds them; its context is the model.
    """

    def __init__(self, modules: Sequence[Module], rounder: Rounder, limits: BudgetConfig) -> None:
        """Measure the losses of ranks and of rounding, or read them from the cache.

        Args:
            modules: the layers with their spectra.
            rounder: with the grids to choose from.
            limits: of the ranks.

        Raises:
            NumericalError: a weight, an input or a gradient is NaN or infinite.
        """
        self.specs, self.rounder = [module.spec for module in modules], rounder
        self._modules, self._limits = modules, limits
        self._tables, self._shares = sensitivity_table(rounder.context).values, rounder.shares()

    def best(self, limit: int, bits: Sequence[int], ranks: bool = True) -> Allocation:
        """Return the allocation with the least estimated loss.

        Args:
            limit: bytes of all layers.
            bits: bits per weight to choose from; 16 means not rounded.
            ranks: whether layers may be factorised.

        Raises:
            UsageError: the smallest choices need more.
        """
        dense = None if ranks else frozenset(spec.name for spec in self.specs)
        floors = floors_of(self._limits, self.specs, dense)
        budget = Budget.for_bytes(self.specs, limit, self.rounder.grids, self.widths(bits), *floors)
        picks = best_choices(self._modules, self._tables, self._shares, budget)
        return Allocation.from_picks(self.specs, picks, budget)

    def dense(self, bits: int) -> Allocation:
        """Return all layers dense at one width, on the first grid of these bits, whatever size that is."""
        grid = next((grid for grid in self.rounder.grids if grid.bits == bits), None)
        return Allocation({spec.name: Choice.stored(spec, None, grid) for spec in self.specs})

    def of_form(self, form: Form, limit: int) -> Allocation:
        """Return the allocation of a form.

        Args:
            form: what may be chosen.
            limit: bytes of all layers, for a form that is made for a size.

        Raises:
            UsageError: the smallest choices need more.
        """
        return self.best(limit, form.bits, form.ranks) if form.sized else self.dense(form.bits[0])

    def widths(self, bits: Sequence[int]) -> tuple[int, ...]:
        """Return bits per weight, largest first; 16 becomes the number of bits that the model has."""
        return widths_of(bits, self.specs)


def widths_of(bits: Sequence[int], specs: Sequence[LinearSpec]) -> tuple[int, ...]:
    """Return bits per weight, largest first; 16 becomes the number of bits that the model has."""
    own = specs[0].bits
    return tuple(dict.fromkeys(own if width == 16 else width for width in sorted(bits, reverse=True)))


def floors_of(
    limits: BudgetConfig, specs: Sequence[LinearSpec], dense: frozenset[str] | None = None
) -> tuple[int, int, float, frozenset[str]]:
    """Return the limits of ranks as :meth:`Budget.for_bytes` takes them; ``dense`` replaces the excluded layers."""
    excluded = matching(specs, limits.exclude) if dense is None else dense
    return limits.rank_multiple, limits.min_rank, limits.min_keep, excluded


def least_bytes(limits: BudgetConfig, specs: Sequence[LinearSpec], grids: Sequence[Grid], bits: Sequence[int]) -> int:
    """Return the bytes of the smallest choices of all layers.

    Args:
        limits: of the ranks.
        specs: the layers.
        grids: of few bits.
        bits: bits per weight to choose from; 16 means not rounded.
    """
    floors = floors_of(limits, specs)
    return Budget(0, *floors, "bytes", widths_of(bits, specs), tuple(grids)).least(specs)
