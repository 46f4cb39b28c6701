"""Losses of ranks and bits together: one estimate for every choice of a layer, so that the knapsack chooses both.

A table has the loss f of every rank, the result of cutting off components. What is cut off is an error of the layer's
outputs, with an energy in the metric of its factors W = B A. There the energy of a change ΔW is

    e(ΔW) = tr(Δ G Δᵀ),    Δ = B⁺ ΔW,    G = E[x xᵀ]

and that of a cut at rank k is the sum T(k) of the spectrum from k on. Rounding is another change of the same weight. So
its loss is read from the same curve, as that of a cut with the same energy:

    loss(k, b) = f(T⁻¹(T(k) + R(k, b)))

R, the energy of rounding, is measured once per layer and width: for the dense weight, and for factors at one rank. At
other ranks it is the same share of the energy that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from ara.allocation.rounded_ends import RoundedEnds
from ara.calibration.moments import collect_moments, shared_inputs
from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.masks.context import TuningContext
from ara.masks.table_cache import cached_table
from ara.models.blocks import BlockRunner
from ara.models.weights import LinearSpec
from ara.quantisation.calibrated import round_calibrated, round_product
from ara.quantisation.nearest import round_to_nearest
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation, Budget, Choice, Module

# Rank at which the rounding of factors is measured, as a share of the largest rank that costs less than dense.
_MEASURED = 0.5


@dataclass(frozen=True)
class RoundingShares:
    """Energy of rounding errors of one layer at one width, as shares of the energy of what is rounded.

    Attributes:
        dense: of the dense weight.
        factors: of the matrices of a low-rank layer.
    """

    dense: float
    factors: float


class Rounder:
    """Rounds the layers of a model at any rank, with the second moments of their inputs in the dense model.

    Attributes:
        context: the model and its windows.
        grids: bits → grid.
        ends: the embedding and the head in few bits; ``None`` if they stay.
    """

    def __init__(self, context: TuningContext, grids: Mapping[int, Grid], ends: Grid | None = None) -> None:
        """Prepare; nothing is rounded yet.

        Args:
            context: the model and its windows.
            grids: bits → grid of layers.
            ends: grid of the embedding and the head, if they are rounded.

        Raises:
            UnsupportedModelError: they cannot be rounded.
            UsageError: a block is longer than a row of them.
        """
        self.context, self.grids = context, grids
        self.ends = None if ends is None else RoundedEnds(context, ends)

    @cached_property
    def _moments(self) -> Mapping[str, torch.Tensor]:
        """Module path → G (n, n) of the inputs of a layer: those of the context, or of its windows to learn from."""
        context, specs = self.context, self.context.model.specs
        if context.moments is not None:
            return context.moments
        context.model.use_dense()
        model = context.model.model
        owners = shared_inputs(model, specs, context.train[:1].to(context.model.device))
        runner = BlockRunner(model, context.train, context.batch_size, report=context.report)
        found = collect_moments(runner, specs, owners, context.report)
        return {name: found[leader].second_moment for name, leader in owners.items()}

    def _moment(self, name: str) -> torch.Tensor:
        """Return G (n, n) of the inputs of a layer, on the device of the model."""
        return self._moments[name].to(self.context.model.device)

    def shares(self) -> dict[str, dict[int, RoundingShares]]:
        """Return module path → bits → rounding error, from the cache of the context if it is there.

        Raises:
            NumericalError: a weight or an input is NaN or infinite.
        """
        found: dict[str, dict[int, RoundingShares]] = {spec.name: {} for spec in self.context.model.specs}
        for bits, grid in self.grids.items():
            for name, shares in self._shares_of(grid).items():
                found[name][bits] = shares
        return found

    def _shares_of(self, grid: Grid) -> dict[str, RoundingShares]:
        specs = self.context.model.specs
        settings: dict[str, str | int] = {"grid": repr(grid), "layout": specs[0].layout}
        if self.context.moments is not None:
            settings["moments"] = "kept"
        sizes = {spec.name: 2 for spec in specs}
        table = cached_table(self.context, settings, sizes, lambda: self._measured(grid), "table of rounding errors")
        return {name: RoundingShares(*values.tolist()) for name, values in table.values.items()}

    def _measured(self, grid: Grid) -> dict[str, torch.Tensor]:
        """Round every layer, dense and at one rank: module path → (2) both shares."""
        found = {}
        specs = self.context.model.specs
        with self.context.report.bar(f"Rounding layers to {grid.bits} bits", len(specs)) as bar:
            for spec in specs:
                layer = self.context.model.layers[spec.name]
                shares = rounding_shares(spec, layer.a, layer.b, self._moment(spec.name), grid)
                found[spec.name] = torch.tensor([shares.dense, shares.factors], dtype=torch.float64)
                bar.advance()
        return found

    def weight(self, spec: LinearSpec, choice: Choice, nearest: bool = False) -> torch.Tensor:
        """Return the weight (m, n) of a layer at a choice, in the model's dtype.

        Args:
            spec: the layer.
            choice: rank and bits.
            nearest: round every number of a dense weight for itself.
        """
        layer, grid = self.context.model.layers[spec.name], self.grids.get(choice.bits)
        if choice.rank is None:
            rounded = layer.weight if grid is None else self._rounded_dense(spec, grid, nearest)
        elif grid is None:
            rounded = layer.b[:, : choice.rank] @ layer.a[: choice.rank]
        else:
            a, b = layer.a[: choice.rank].double(), layer.b[:, : choice.rank].double()
            rounded = _rounded_product(spec, a, b, self._moment(spec.name), grid)
        return rounded.to(layer.weight)

    def _rounded_dense(self, spec: LinearSpec, grid: Grid, nearest: bool) -> torch.Tensor:
        exact = self.context.model.layers[spec.name].weight
        if nearest:
            return round_to_nearest(exact, grid).weight()
        return round_calibrated(exact, self._moment(spec.name), grid).weight()

    def loss(self, name: str, allocation: Allocation, nearest: bool = False, ends: bool = True) -> torch.Tensor:
        """Return the loss of each held-out window with the rounded weights of an allocation, nats per token.

        Args:
            name: shown with the progress.
            allocation: rank and bits of every layer.
            nearest: as of :meth:`weight`.
            ends: whether to round the embedding and the head too, if they have few bits.
        """
        context, model = self.context, self.context.model
        model.use_dense()
        kept = {path: layer.weight for path, layer in model.layers.items()}
        weights = {}
        with context.report.bar(f"Rounding: {name}", len(model.specs)) as bar:
            for spec in model.specs:
                weights[spec.name] = self.weight(spec, allocation.choices[spec.name], nearest)
                bar.advance()
        try:
            for path, weight in weights.items():
                model.layers[path].weight = weight
            with self.ends.in_place(nearest) if self.ends is not None and ends else nullcontext():
                return model.nll(context.held_out, context.batch_size)
        finally:
            for path, weight in kept.items():
                model.layers[path].weight = weight

    def losses(self, candidates: Mapping[str, Allocation]) -> dict[str, torch.Tensor]:
        """Return the loss of each held-out window with each candidate and with ``dense``, nats per token."""
        self.context.model.use_dense()
        found = {"dense": self.context.model.nll(self.context.held_out, self.context.batch_size)}
        for name, allocation in candidates.items():
            same = next((other for other in candidates if other in found and candidates[other] == allocation), None)
            found[name] = self.loss(name, allocation) if same is None else found[same]
        return found


def _rounded_product(
    spec: LinearSpec, a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the weight (m, n) of a low-rank layer, float64, after rounding the matrices that its layout stores."""
    layout = layout_named(spec.layout)
    tensors = layout.split(a, b)
    first, second = (name for name in tensors if name not in layout.indices)
    rounded = round_product(tensors[first], tensors[second], moment, grid)
    numbers = {name: one.weight().double() for name, one in zip((first, second), rounded, strict=True)}
    return layout.multiply({**tensors, **numbers}, spec.m, torch.float64)


def rounding_shares(
    spec: LinearSpec, a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor, grid: Grid
) -> RoundingShares:
    """Round a layer, dense and at one rank, and measure both.

    Args:
        spec: the layer.
        a: A (r, n), full factors.
        b: B (m, r).
        moment: G (n, n).
        grid: to round to.
    """
    a, b, g = a.double(), b.double(), moment.double()
    inverse = torch.linalg.pinv(b)

    def energy(change: torch.Tensor) -> float:
        coordinates = inverse @ change
        return float(((coordinates @ g) * coordinates).sum())

    weight = b @ a
    dense = energy(round_calibrated(weight, moment, grid).weight().double() - weight) / energy(weight)
    rank = max(1, round(_MEASURED * spec.top_rank))
    kept = b[:, :rank] @ a[:rank]
    change = _rounded_product(spec, a[:rank], b[:, :rank], moment, grid) - kept
    return RoundingShares(dense, energy(change) / energy(kept))


def joint_losses(
    module: Module, table: torch.Tensor, shares: Mapping[int, RoundingShares], budget: Budget
) -> torch.Tensor:
    """Return the estimated loss of every choice of a layer.

    Args:
        module: the layer and its spectrum (r).
        table: (r + 1), loss of keeping k components; the last entry is the dense layer.
        shares: bits → energy of rounding; a width without an entry is not rounded.
        budget: offers the choices.

    Returns:
        (c) float64, in the order of ``budget.choices(module.spec)``.
    """
    spectrum = module.spectrum.double()
    total = spectrum.sum()
    tail = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
    loss_of = _curve(tail, table)
    choices = budget.choices(module.spec)
    kept = torch.tensor([len(spectrum) if choice.rank is None else choice.rank for choice in choices])
    share = torch.zeros(len(choices), dtype=torch.float64)
    for at, choice in enumerate(choices):
        if (found := shares.get(choice.bits)) is not None:
            share[at] = found.dense if choice.rank is None else found.factors
    cut = torch.where(kept == len(spectrum), torch.zeros(1, dtype=torch.float64), tail[kept])
    return loss_of(cut + share * (total - cut))


def _curve(tail: torch.Tensor, table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the loss as a function of the energy that is missing, linear between the ranks."""
    energies, at = tail.flip(0).sort()
    # A smaller energy never counts as losing more.
    losses = table.double().flip(0)[at].cummax(0).values

    def loss_of(energy: torch.Tensor) -> torch.Tensor:
        right = torch.searchsorted(energies, energy).clamp(1, len(energies) - 1)
        low, high = energies[right - 1], energies[right]
        part = ((energy - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
        return losses[right - 1] + part * (losses[right] - losses[right - 1])

    return loss_of


def best_choices(
    modules: Sequence[Module],
    tables: Mapping[str, torch.Tensor],
    shares: Mapping[str, Mapping[int, RoundingShares]],
    budget: Budget,
) -> list[int]:
    """Return the choice of every layer with the least summed loss, as indices into ``budget.choices``.

    Args:
        modules: the layers.
        tables: module path → losses of its ranks.
        shares: module path → bits → energy of rounding.
        budget: in bytes.
    """
    losses = [joint_losses(one, tables[one.spec.name], shares[one.spec.name], budget) for one in modules]
    return exact_minimise([one.spec for one in modules], losses, budget)
