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
from dataclasses import dataclass

import torch

from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.models.weights import LinearSpec
from ara.quantisation.calibrated import round_calibrated, round_product
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Budget, Module

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
    layout = layout_named(spec.layout)
    tensors = layout.split(a[:rank], b[:, :rank])
    names = [name for name in tensors if name not in layout.indices]
    first, second = round_product(tensors[names[0]], tensors[names[1]], moment, grid)
    rounded = {**tensors, names[0]: first.weight().double(), names[1]: second.weight().double()}
    kept = b[:, :rank] @ a[:rank]
    change = layout.multiply(rounded, spec.m, torch.float64) - kept
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
