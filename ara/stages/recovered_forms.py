"""The repaired forms of ``ara compare --size``, made in memory as ``ara recover`` and ``ara quantise`` make them.

A model with ranks is repaired and then rounded. A dense model of few bits is rounded, and then the levels that can
train the scales of its blocks repair it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ara.allocation.forms import Form
from ara.artifacts.factors import FactorsSettings, factor_files, specs_of
from ara.config import CompareConfig, RecoverConfig
from ara.config.sizes import few_bits
from ara.layouts.grid import Grid
from ara.models.likelihood import nll_of_model
from ara.models.low_rank import apply_factors
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec
from ara.quantisation.plan import RoundingPlan
from ara.quantisation.sequential import round_model
from ara.recovery.base import Level
from ara.recovery.rounded import from_scaled
from ara.recovery.trainable import from_trainable
from ara.solver.problem import Allocation
from ara.stages.common import Run, model_of
from ara.stages.recover import check_levels, idle_settings
from ara.stages.recovery_levels import LevelRuns, open_recovery
from ara.stages.recovery_text import RecoveryTexts, recovery_texts
from ara.stages.rounding_parts import RoundingParts
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.layouts.modeling_ara import RoundedMatrix


class FormRepairs:
    """Repairs forms of a model, one after the other.

    Attributes:
        levels: to run, by name and in order.
        texts: windows of the levels. The first level learns from those that ranks are chosen with; forms are compared
            on the fresh ones.
    """

    def __init__(self, config: CompareConfig, decomposition: StageView, workspace: Workspace, run: Run) -> None:
        """Check the levels and read the text; no model is loaded yet.

        Args:
            config: with a level, and with resolved device and dtype.
            decomposition: the factors.
            workspace: holds the token cache.
            run: reporter.

        Raises:
            AraError: there is no such level, or the text has fewer than three windows.
        """
        self._config, self._decomposition, self._run = config, decomposition, run
        self._source = model_of(decomposition, run)
        self._recovery = RecoverConfig(
            level=config.recover,
            samples=config.samples,
            held_out=config.held_out,
            batch_size=config.batch_size,
            # The windows of the decomposition are left out only where its seed is the same.
            seed=FactorsSettings.read(decomposition).seed,
            device=config.device,
            dtype=config.dtype,
        )
        self.levels = check_levels(self._recovery)
        self.texts: RecoveryTexts = recovery_texts(
            self._recovery, self.levels, None, decomposition, self._source, workspace, run, fresh=config.held_out
        )

    @property
    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to choose ranks and to round with, and held-out ones, (w, t) int64 each."""
        return next(iter(self.texts.train.values())).ids, self.texts.fresh

    @property
    def settings(self) -> dict[str, Any]:
        """What the repairs depend on."""
        return self._recovery.model_dump(mode="json", exclude=idle_settings(self.levels))

    def levels_of(self, form: Form, allocation: Allocation) -> dict[str, Level]:
        """Return the levels that can repair a form; none for a dense model that is not rounded."""
        if allocation.low_rank():
            return self.levels
        return {name: level for name, level in self.levels.items() if form.rounds and level.not_rounded is None}

    def losses(
        self, key: str, form: Form, allocation: Allocation, stage: StageWriter
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Make, repair and measure one model; an interrupted run resumes with the next part of it.

        Args:
            key: name of the model.
            form: how it is rounded.
            allocation: its ranks and bits.
            stage: keeps finished parts, whose names start with the key and a dot.

        Returns:
            (w) float64, loss of each fresh window, nats per token; names of the levels that were not taken back.

        Raises:
            NumericalError: NaN, or a training that diverges.
        """
        model = self._cut(allocation)
        plan = self._plan(form, allocation)
        parts = RoundingParts(stage, f"{key}.")
        windows = None if form.method == "nearest" else self.windows[0]
        rounds = form.rounds and bool(plan.layers or plan.embedding_bits)
        batch, report = self._config.batch_size, self._run.report
        if allocation.low_rank():
            kept = self._repair(key, model, {}, self.levels_of(form, allocation), stage)
            from_trainable(model, self._config.layout, torch_dtype(self._config.dtype), report)
            _as_stored(model, self._dtype)
            if rounds:
                round_model(model, self._specs, plan.grids(model), windows, batch, parts, report)
        else:
            rounded = round_model(model, self._specs, plan.grids(model), windows, batch, parts, report)
            kept = self._repair(key, model, rounded, self.levels_of(form, allocation), stage)
            from_scaled(model, rounded)
        return nll_of_model(model, self.texts.fresh, batch, report), kept

    @cached_property
    def _specs(self) -> list[LinearSpec]:
        return specs_of(self._decomposition, self._config.layout)

    @cached_property
    def _dtype(self) -> str:
        """Name of the dtype in which weights would be stored."""
        return FactorsSettings.read(self._decomposition).stored_dtype

    @cached_property
    def _dense(self) -> PreTrainedModel:
        return self._load()

    def _load(self) -> PreTrainedModel:
        return self._source.load_model(torch_dtype(self._config.dtype), self._config.device)

    def _cut(self, allocation: Allocation) -> PreTrainedModel:
        """Return the model at the ranks of an allocation, as ``ara truncate`` would store it."""
        model, files = self._load(), factor_files(self._decomposition, self._specs)
        apply_factors(model, allocation.low_rank(), files, self._config.layout, self._run.report)
        model.eval().requires_grad_(False)
        _as_stored(model, self._dtype)
        return model

    def _plan(self, form: Form, allocation: Allocation) -> RoundingPlan:
        block, zero_points = self._config.blocks[0], self._config.zero_points
        ends = few_bits(self._config.embedding_bits) if form.rounds else None
        return RoundingPlan(
            allocation.grids(block, zero_points), None if ends is None else Grid(ends, block, zero_points)
        )

    def _repair(
        self,
        key: str,
        model: PreTrainedModel,
        rounded: Mapping[str, RoundedMatrix],
        levels: Mapping[str, Level],
        stage: StageWriter,
    ) -> tuple[str, ...]:
        """Run the levels on a model, in place; returns the names of those that were not taken back."""
        files = factor_files(self._decomposition, self._specs)
        recovery = open_recovery(
            self._dense,
            model,
            rounded,
            self._specs,
            files,
            self.texts,
            self._recovery,
            self._dtype,
            stage,
            self._run.report,
        )
        figures, _ = LevelRuns(recovery, stage, self.texts, f"{key}.").all(levels)
        return tuple(row.level for row in figures.levels if row.kept)


@torch.no_grad()
def _as_stored(model: PreTrainedModel, dtype: str) -> None:
    """Round the parameters of a model to what a checkpoint of a dtype would hold, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(parameter.to(torch_dtype(dtype)))
