"""Losses of ranks and bits together: one estimate for every choice of a layer, so that the knapsack chooses both.

A table has the loss f of every rank, the result of cutting off components. What is cut off is an error of the layer's
outputs, with an energy in the metric of its factors W = B A. There the energy of a change ΔW is

    e(ΔW) = tr(Δ G Δᵀ),    Δ = B⁺ ΔW,    G = E[x xᵀ]

and that of a cut at rank k is the sum T(k) of the spectrum from k on. Rounding is another change of the same weight. So
its loss is read from the same curve, as that of a cut with the same energy:

    loss(k, b) = f(T⁻¹(T(k) + R(k, b)))

R, the energy of rounding, is measured once per layer and grid: for the dense weight, and for factors at one rank. At
other ranks it is the same share of the energy that is kept. A grid has few bits and a length of blocks, so both are
chosen: longer blocks have fewer scales and larger errors. Of several lengths the shortest and the longest are measured.
Between them log R is taken to be linear in the logarithm of the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import torch

from ara.allocation.rounded_ends import RoundedEnds
from ara.calibration.moments import collect_moments, shared_inputs
from ara.decomposition.parallel import map_layers
from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.masks.context import TuningContext
from ara.models.blocks import BlockRunner
from ara.models.weights import LinearSpec, by_block
from ara.quantisation.calibrated import mixed_basis, round_calibrated, round_product
from ara.quantisation.nearest import round_to_nearest
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation, Budget, Choice, Module

# Rank at which the rounding of factors is measured, as a share of the largest rank that costs less than dense.
_MEASURED = 0.5


@dataclass(frozen=True)
class RoundingShares:
    """Energy of rounding errors of one layer on one grid, as shares of the energy of what is rounded.

    Attributes:
        dense: of the dense weight.
        factors: of the matrices of a low-rank layer.
    """

    dense: float
    factors: float

    def towards(self, other: RoundingShares, part: float) -> RoundingShares:
        """Return these shares at ``part`` 0 and the other ones at 1; their logarithms are linear in between."""
        if part == 0 or self == other:
            return self
        pairs = ((self.dense, other.dense), (self.factors, other.factors))
        return RoundingShares(*(one ** (1 - part) * two**part for one, two in pairs))


def _place(block: int, first: int, last: int) -> float:
    """Return where a length is between two, on a logarithmic scale from 0 to 1."""
    return math.log(block / first) / math.log(last / first) if last > first else 0.0


# Bits and block of a grid → what rounding to it loses.
Shares = Mapping[tuple[int, int | None], RoundingShares]


class Rounder:
    """Rounds the layers of a model at any rank, with the second moments of their inputs in the dense model.

    Attributes:
        context: the model and its windows.
        grids: of layers; of those with the same bits the first one is for layers of one width.
        ends: the embedding and the head in few bits; ``None`` if they stay.
    """

    def __init__(self, context: TuningContext, grids: Sequence[Grid], ends: Grid | None = None) -> None:
        """Prepare; nothing is rounded yet.

        Args:
            context: the model and its windows.
            grids: of layers.
            ends: grid of the embedding and the head, if they are rounded.

        Raises:
            UnsupportedModelError: they cannot be rounded.
            UsageError: a block is longer than a row of them.
        """
        self.context, self.grids = context, tuple(grids)
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

    def shares(self) -> Mapping[str, Shares]:
        """Return module path → rounding errors, from the cache of the context if it is there.

        Raises:
            NumericalError: a weight or an input is NaN or infinite.
        """
        found: dict[str, dict[tuple[int, int | None], RoundingShares]] = {
            spec.name: {} for spec in self.context.model.specs
        }
        for bits in dict.fromkeys(grid.bits for grid in self.grids):
            grids = sorted((grid for grid in self.grids if grid.bits == bits), key=lambda grid: grid.block)
            first, last = (self._shares_of(grid) for grid in (grids[0], grids[-1]))
            for grid in grids:
                part = _place(grid.block, grids[0].block, grids[-1].block)
                for name, own in found.items():
                    own[bits, grid.block] = first[name].towards(last[name], part)
        return found

    def _shares_of(self, grid: Grid) -> dict[str, RoundingShares]:
        specs = self.context.model.specs
        settings: dict[str, str | int] = {"grid": repr(grid), "layout": specs[0].layout}
        if self.context.moments is not None:
            settings["moments"] = "kept"
        if layout_named(specs[0].layout).free_basis:
            settings["basis"] = "mixed"
        sizes = {spec.name: 2 for spec in specs}
        table = self.context.cached_table(settings, sizes, lambda: self._measured(grid), "table of rounding errors")
        return {name: RoundingShares(*values.tolist()) for name, values in table.values.items()}

    def _measured(self, grid: Grid) -> dict[str, torch.Tensor]:
        """Round every layer, dense and at one rank: module path → (2) both shares."""
        model, found = self.context.model, {}
        reading = Lock()

        def measured(spec: LinearSpec, _: None) -> RoundingShares:
            # Kept moments are read by one thread at a time.
            with reading:
                moment = self._moment(spec.name)
            layer = model.layers[spec.name]
            return rounding_shares(spec, layer.a, layer.b, moment, grid)

        label = f"Rounding layers to {grid.bits} bits, blocks of {grid.block}"
        with self.context.report.bar(label, len(model.specs)) as bar:
            for block in by_block(model.specs):
                work = [(spec, None) for spec in block]
                for spec, shares in zip(block, map_layers(measured, work, model.device), strict=True):
                    found[spec.name] = torch.tensor([shares.dense, shares.factors], dtype=torch.float64)
                    bar.advance()
        return found

    def weight(self, spec: LinearSpec, choice: Choice, nearest: bool = False) -> torch.Tensor:
        """Return the weight (m, n) of a layer at a choice, in the model's dtype.

        Args:
            spec: the layer.
            choice: rank, bits and block.
            nearest: round every number of a dense weight for itself.
        """
        layer = self.context.model.layers[spec.name]
        grid = next((grid for grid in self.grids if (grid.bits, grid.block) == choice.width), None)
        if choice.rank is None:
            rounded = layer.weight if grid is None else self._rounded_dense(spec, grid, nearest)
        elif grid is None:
            rounded = layer.b[:, : choice.rank] @ layer.a[: choice.rank]
        else:
            a, b = layer.a[: choice.rank].double(), layer.b[:, : choice.rank].double()
            rounded = rounded_product(spec, a, b, self._moment(spec.name), grid)
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


def rounded_product(
    spec: LinearSpec, a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the weight (m, n) of a low-rank layer, float64, after rounding the matrices that its layout stores.

    Args:
        spec: the layer; its layout decides what is stored, and in which basis.
        a: A (k, n).
        b: B (m, k).
        moment: G (n, n).
        grid: to round to.
    """
    layout = layout_named(spec.layout)
    if layout.free_basis:
        a, b = mixed_basis(a, b, moment)
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
    a, b = a.double(), b.double()
    energy = energy_of(b, moment)
    weight = b @ a
    dense = energy(round_calibrated(weight, moment, grid).weight().double() - weight) / energy(weight)
    rank = max(1, round(_MEASURED * spec.top_rank))
    kept = b[:, :rank] @ a[:rank]
    change = rounded_product(spec, a[:rank], b[:, :rank], moment, grid) - kept
    return RoundingShares(dense, energy(change) / energy(kept))


def energy_of(b: torch.Tensor, moment: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Return the energy e(ΔW) of a change (m, n) of a weight, in the metric of its factors; see this module.

    Args:
        b: B (m, r) float64, all components.
        moment: G (n, n).
    """
    inverse, g = torch.linalg.pinv(b), moment.double()

    def energy(change: torch.Tensor) -> float:
        coordinates = inverse @ change
        return float(((coordinates @ g) * coordinates).sum())

    return energy


def joint_losses(module: Module, table: torch.Tensor, shares: Shares, budget: Budget) -> torch.Tensor:
    """Return the estimated loss of every choice of a layer.

    Args:
        module: the layer and its spectrum (r).
        table: (r + 1), loss of keeping k components; the last entry is the dense layer.
        shares: energy of rounding; a width without an entry is not rounded.
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
        if (found := shares.get(choice.width)) is not None:
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
    shares: Mapping[str, Shares],
    budget: Budget,
) -> list[int]:
    """Return the choice of every layer with the least summed loss, as indices into ``budget.choices``.

    Args:
        modules: the layers.
        tables: module path → losses of its ranks.
        shares: module path → energy of rounding.
        budget: in bytes.
    """
    losses = [joint_losses(one, tables[one.spec.name], shares[one.spec.name], budget) for one in modules]
    return exact_minimise([one.spec for one in modules], losses, budget)
