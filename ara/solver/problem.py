"""The solver's types: the choices of a layer, the budget over all layers, and the allocation of one choice each.

A layer's choices are the ranks 1·s, 2·s, … (s the rank multiple) that cost less than the dense weight and whose factors
are stored, and dense. A rank that costs as much as the dense weight W is not offered, because W itself is the better
layer (ARA, arXiv 2510.19389, Eq. 8). The parameters of a rank depend on the layout, see
:meth:`ara.models.weights.LinearSpec.cost`. Its time depends on the machine, see :mod:`ara.solver.times`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from ara.errors import UsageError
from ara.layouts.grid import BITS, Grid
from ara.models.weights import LinearSpec
from ara.solver.times import TimeTable

# The rank of a dense layer in files and tables.
DENSE = "dense"

Unit = Literal["parameters", "bytes", "nanoseconds"]


@dataclass(frozen=True)
class Module:
    """A factorised layer, as an allocator gets it.

    Attributes:
        spec: name, layer, kind and widths.
        spectrum: (r) float64, see :class:`ara.decomposition.base.Factors`.
    """

    spec: LinearSpec
    spectrum: torch.Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """How one layer is stored.

    Attributes:
        rank: kept rank; ``None`` for the dense weight.
        bits: per stored weight.
        cost: in the unit of the budget.
        block: weights that share a scale; ``None`` if they have none.
    """

    rank: int | None
    bits: int
    cost: int
    block: int | None = None

    @property
    def width(self) -> tuple[int, int | None]:
        """Bits and block: what the weights are rounded to."""
        return self.bits, self.block

    @classmethod
    def of(
        cls,
        spec: LinearSpec,
        rank: int | None,
        unit: Literal["parameters", "bytes"] = "parameters",
        bits: int | None = None,
    ) -> Choice:
        """Return the choice of ``rank`` for a layer, with its cost.

        Args:
            spec: the layer.
            rank: ``None`` for dense.
            unit: of the cost. Bytes are rounded up to whole ones; only the weights count.
            bits: per weight; those of the model by default.
        """
        bits = spec.bits if bits is None else bits
        parameters = spec.dense_cost if rank is None else spec.cost(rank)
        return cls(rank, bits, parameters if unit == "parameters" else -(-bits * parameters // 8))

    @classmethod
    def stored(cls, spec: LinearSpec, rank: int | None, grid: Grid | None) -> Choice:
        """Return the choice of ``rank`` for a layer; its cost is the bytes in a checkpoint, with scales and indices.

        Args:
            spec: the layer.
            rank: ``None`` for dense.
            grid: of its weights; ``None``: they stay as they are.
        """
        bits, block = (spec.bits, None) if grid is None else (grid.bits, grid.block)
        return cls(rank, bits, spec.stored_bytes(rank, grid), block)


@dataclass(frozen=True)
class Budget:
    """A limit on the summed cost of the factorised layers, and the choices of each layer.

    Attributes:
        limit: largest summed cost.
        rank_multiple: every kept rank is a multiple of this.
        min_rank: least rank of a layer; rounded up to a multiple of ``rank_multiple``.
        min_keep: least share of a layer's dense parameters, in [0, 1].
        dense: module paths of the layers that always stay dense.
        unit: of the limit and of all costs.
        bits: bit widths offered for every layer; ``None`` for the model's own.
        grids: of weights of few bits, several for the same bits perhaps; costs are then those of :meth:`Choice.stored`.
        times: of every shape, for a limit in nanoseconds.
    """

    limit: int
    rank_multiple: int = 1
    min_rank: int = 1
    min_keep: float = 0.0
    dense: frozenset[str] = frozenset()
    unit: Unit = "parameters"
    bits: tuple[int, ...] | None = None
    grids: tuple[Grid, ...] | None = None
    times: TimeTable | None = None
    # Cache: layers of the same shape have the same choices.
    _offered: dict[Hashable, tuple[Choice, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def for_keep(
        cls,
        specs: Sequence[LinearSpec],
        keep: float,
        rank_multiple: int = 1,
        min_rank: int = 1,
        min_keep: float = 0.0,
        dense: frozenset[str] = frozenset(),
        times: TimeTable | None = None,
    ) -> Budget:
        """Return the budget that keeps the fraction ``keep`` of what ``specs`` cost if they are dense.

        Args:
            specs: the layers.
            keep: in (0, 1].
            rank_multiple, min_rank, min_keep, dense: as of :class:`Budget`.
            times: limit the time of the layers, which is this; by default their parameters are limited.

        Raises:
            UsageError: the cheapest choices cost more.
        """
        unit: Unit = "parameters" if times is None else "nanoseconds"
        offered = cls(0, rank_multiple, min_rank, min_keep, dense, unit, times=times)
        total = sum(offered.dense_cost(spec) for spec in specs)
        # The small term compensates for rounding in products such as 0.8 · 1 000 000.
        budget = replace(offered, limit=int(keep * total + 1e-6))
        least = sum(budget.choices(spec)[0].cost for spec in specs)
        if least > budget.limit:
            floors = [f"at least {min_rank}", f"multiples of {rank_multiple}"]
            floors += [f"{min_keep:.0%} of each layer"] if min_keep else []
            floors += [f"{len(dense)} layers dense"] if dense else []
            cheapest = "least ranks" if times is None else "fastest choices"
            raise UsageError(
                f"keep {keep:g} allows {budget.limit:,} {unit}, but the {cheapest} "
                f"(ranks {', '.join(floors)}) already cost {least:,}",
                f"use --keep {min(1.0, least / total + 0.005):.2f} or more, or a smaller --min-rank or --rank-multiple",
            )
        return budget

    @classmethod
    def for_bytes(
        cls,
        specs: Sequence[LinearSpec],
        limit: int,
        grids: Sequence[Grid],
        bits: Sequence[int],
        rank_multiple: int = 1,
        min_rank: int = 1,
        min_keep: float = 0.0,
        dense: frozenset[str] = frozenset(),
    ) -> Budget:
        """Return the budget of ``limit`` bytes for the factorised layers of a checkpoint.

        Args:
            specs: the layers.
            limit: bytes.
            grids: of few bits.
            bits: widths to choose from; those without a grid are the model's own.
            rank_multiple, min_rank, min_keep, dense: as of :class:`Budget`.

        Raises:
            UsageError: the smallest choices need more.
        """
        budget = cls(limit, rank_multiple, min_rank, min_keep, dense, "bytes", tuple(bits), tuple(grids))
        least = budget.least(specs)
        if least > limit:
            raise UsageError(
                f"{limit:,} bytes are left for the factorised layers, and their smallest choices need {least:,}",
                "allow a larger --size, fewer bits, or a smaller --min-rank",
            )
        return budget

    def least(self, specs: Sequence[LinearSpec]) -> int:
        """Return what the cheapest choices of all layers cost."""
        return sum(self.choices(spec)[0].cost for spec in specs)

    def choices(self, spec: LinearSpec) -> tuple[Choice, ...]:
        """Return all choices of a layer, cheapest first; the last one is dense at the largest bit width.

        At one bit width and block, costs increase strictly with the rank.
        """
        key = (spec.m, spec.n, spec.layout, spec.bits, spec.stored, spec.name in self.dense)
        if key not in self._offered:
            self._offered[key] = self._list(spec)
        return self._offered[key]

    def choice(self, spec: LinearSpec, rank: int | None, bits: int | None = None, grid: Grid | None = None) -> Choice:
        """Return the choice of a rank, offered or not, with its cost in the unit of the budget.

        Args:
            spec: the layer.
            rank: ``None`` for dense.
            bits: per weight; those of the model by default.
            grid: of the weights, if the budget has grids.
        """
        if self.grids is not None:
            return Choice.stored(spec, rank, grid)
        if self.unit != "nanoseconds":
            return Choice.of(spec, rank, self.unit, bits)
        assert self.times is not None, "a budget of time needs times"
        return Choice(rank, spec.bits if bits is None else bits, self.times.nanoseconds(spec, rank))

    def _list(self, spec: LinearSpec) -> tuple[Choice, ...]:
        ranks: Sequence[int] = ()
        if spec.name not in self.dense:
            step = self.rank_multiple
            # The small term compensates for rounding in products such as 0.3 · 1 000 000.
            floor = self.min_keep * spec.dense_cost - 1e-6
            least = max(self.min_rank, 1 + bisect_left(range(1, spec.top_rank + 1), floor, key=spec.cost))
            ranks = range(max(step, -(-least // step) * step), spec.top_rank + 1, step)
        found: list[Choice] = []
        for bits in self.bits or (spec.bits,):
            own: list[Grid | None] = [grid for grid in self.grids or () if grid.bits == bits]
            for grid in own or [None]:
                rising = [self.choice(spec, rank, bits, grid) for rank in (*ranks, None)]
                # A rank may need no fewer bytes, or no less time, than a larger one or than the dense weight: it is
                # not offered.
                for choice in reversed(rising):
                    if not found or found[-1].width != choice.width or choice.cost < found[-1].cost:
                        found.append(choice)
        return tuple(sorted(found, key=lambda choice: (choice.cost, choice.bits)))

    def rank_choices(self, spec: LinearSpec) -> tuple[Choice, ...]:
        """Return :meth:`choices` for a method that chooses only ranks, so there must be one bit width.

        Raises:
            ValueError: the budget offers several bit widths.
        """
        if self.bits is not None and len(self.bits) != 1:
            raise ValueError(f"this method chooses ranks alone, the budget offers {len(self.bits)} bit widths")
        return self.choices(spec)

    def rank_steps(self, spec: LinearSpec, pick: int) -> Sequence[int]:
        """Return indices into :meth:`choices`: ``pick`` and all larger choices of its bit width and block."""
        choices = self.choices(spec)
        later = range(pick, len(choices))
        one_width = (self.bits is None or len(self.bits) == 1) and len(self.grids or ()) < 2
        return later if one_width else [at for at in later if choices[at].width == choices[pick].width]

    def dense_cost(self, spec: LinearSpec) -> int:
        """Return the cost of the dense layer at the largest bit width."""
        return self.choices(spec)[-1].cost

    def in_parameters(self, specs: Sequence[LinearSpec]) -> float:
        """Return the limit in parameters: the limit times dense parameters per dense cost."""
        if self.unit == "parameters":
            return self.limit
        return self.limit * sum(spec.dense_cost for spec in specs) / sum(self.dense_cost(spec) for spec in specs)

    def met_by(self, specs: Sequence[LinearSpec], ranks: Mapping[str, int | None]) -> Allocation | None:
        """Return the allocation of ``ranks`` if it meets the budget exactly, else ``None``.

        It does if every rank is offered, all fit, and the rest of the budget is too small for a step of any layer.
        """
        picks, steps = [], []
        for spec in specs:
            choices = self.rank_choices(spec)
            at = next((i for i, choice in enumerate(choices) if choice.rank == ranks[spec.name]), None)
            if at is None:
                return None
            picks.append(at)
            steps += [after.cost - choices[at].cost for after in choices[at + 1 : at + 2]]
        allocation = Allocation.from_picks(specs, picks, self)
        left = self.limit - allocation.cost
        return allocation if 0 <= left < min(steps, default=left + 1) else None


@dataclass(frozen=True)
class Allocation:
    """The choice of every layer, by module path."""

    choices: Mapping[str, Choice]

    @classmethod
    def from_picks(cls, specs: Sequence[LinearSpec], picks: Sequence[int], budget: Budget) -> Allocation:
        """Return the allocation of ``picks``, an index into ``budget.choices(spec)`` per layer."""
        return cls({spec.name: budget.choices(spec)[pick] for spec, pick in zip(specs, picks, strict=True)})

    @classmethod
    def of_ranks(
        cls, specs: Sequence[LinearSpec], ranks: Mapping[str, int | None], budget: Budget | None = None
    ) -> Allocation:
        """Return the allocation of ``ranks``, which need not be offered by the budget.

        Args:
            specs: the layers.
            ranks: module path → rank, or ``None`` for dense.
            budget: gives the costs and the bit width; by default parameters and the model's bits.
        """
        priced = Budget(0) if budget is None else budget
        bits = None if priced.bits is None else priced.bits[0]
        return cls({spec.name: priced.choice(spec, ranks[spec.name], bits) for spec in specs})

    @cached_property
    def ranks(self) -> dict[str, int | None]:
        """Module path → kept rank; ``None`` means dense."""
        return {name: choice.rank for name, choice in self.choices.items()}

    @property
    def cost(self) -> int:
        """Summed cost, in the unit of the budget."""
        return sum(choice.cost for choice in self.choices.values())

    def parameters(self, specs: Sequence[LinearSpec]) -> int:
        """Return the parameters of all ``specs`` under this allocation; bits do not matter."""
        return sum(Choice.of(spec, self.choices[spec.name].rank).cost for spec in specs)

    def keep(self, specs: Sequence[LinearSpec]) -> float:
        """Return the kept fraction of the layers' dense parameters."""
        return self.parameters(specs) / sum(spec.dense_cost for spec in specs)

    def low_rank(self) -> dict[str, int]:
        """Return module path → rank of the layers that are not dense."""
        return {name: choice.rank for name, choice in self.choices.items() if choice.rank is not None}

    def grids(self, block: int, zero_points: bool) -> dict[str, Grid]:
        """Return module path → grid of the layers with few bits.

        Args:
            block: of layers whose choice names none.
            zero_points: of all grids.
        """
        return {
            name: Grid(bits, choice.block or block, zero_points)
            for name, choice in self.choices.items()
            for bits in BITS
            if choice.bits == bits
        }

    def dense_count(self) -> int:
        """Return the number of dense layers."""
        return sum(choice.rank is None for choice in self.choices.values())
