"""The checkpoint that a stage changes further, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults, CheckpointSettings, RoundingFigures
from ara.artifacts.factors import specs_of
from ara.artifacts.ranks import layout_of
from ara.errors import WorkspaceError
from ara.layout_names import LayoutName
from ara.models.accounting import weight_bytes
from ara.models.checkpoint import checkpoint_bytes, save_checkpoint
from ara.models.low_rank import low_rank_layers
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec
from ara.stages.common import Run, model_of
from ara.stages.truncate import finish_checkpoint, provenance
from ara.workspace.manifest import Manifest
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.layouts.modeling_ara import RoundedMatrix


@dataclass(frozen=True)
class Compressed:
    """A checkpoint that has not been densified.

    Attributes:
        view: the checkpoint.
        results: its figures.
        ranks: the allocation that it was cut at.
        factors: the decomposition that it was cut from.
    """

    view: StageView
    results: CheckpointResults
    ranks: StageView
    factors: StageView

    @cached_property
    def dtype(self) -> str:
        """Name of the dtype of the stored weights."""
        return CheckpointSettings.read(self.view).dtype

    @property
    def rounding(self) -> RoundingFigures | None:
        """How it was rounded to few bits; ``None`` if it was not."""
        return self.results.rounding

    @cached_property
    def layout(self) -> LayoutName:
        """How the low-rank layers are stored."""
        return layout_of(self.ranks)

    @cached_property
    def specs(self) -> list[LinearSpec]:
        """The factorised layers, low-rank or dense, in the order of the model."""
        return specs_of(self.factors, self.layout)

    @property
    def shared_experts(self) -> bool:
        """Whether one layer of all experts of a block maps up."""
        return any(spec.experts > 1 for spec in self.specs)

    def write(
        self,
        model: PreTrainedModel,
        stage: StageWriter,
        run: Run,
        how: Mapping[str, Any],
        rounded: Mapping[str, RoundedMatrix] | None = None,
        **figures: Any,
    ) -> None:
        """Store the changed model as the checkpoint of a stage, in the dtype of this one.

        Args:
            model: its layers have the layout of this checkpoint.
            stage: where to write.
            run: reporter.
            how: what the stage adds to the provenance in ``config.json``.
            rounded: path of a matrix → its module of few bits.
            figures: fields of :class:`CheckpointResults` that the stage has changed; sizes are measured here.
        """
        decomposition, ranks = _manifest(self.factors), _manifest(self.ranks)
        run.report.fact("writing the checkpoint")
        for part in (model, *(rounded or {}).values()):
            part.to(torch_dtype(self.dtype))
        folder = stage.folder / CHECKPOINT
        save_checkpoint(
            model,
            model_of(self.factors, run).load_processor(),
            folder,
            ranks=low_rank_layers(model),
            layout=self.layout,
            rounded=rounded,
            provenance={**provenance(decomposition, ranks), **how},
        )
        results = replace(
            self.results, weight_bytes=weight_bytes(model), disk_bytes=checkpoint_bytes(folder), **figures
        )
        finish_checkpoint(stage, results, decomposition, ranks, self.dtype, run.report)


def require_compressed(workspace: Workspace, name: str | None, not_by: Sequence[str], verb: str) -> Compressed:
    """Return a checkpoint that a stage can change.

    Args:
        workspace: holds it.
        name: NAME or STAGE/NAME; by default the latest one that is not rounded and that no stage of ``not_by`` has
            made.
        not_by: names of stages.
        verb: what the stage does, for messages: recover.

    Raises:
        WorkspaceError: there is none, or it is densified.
    """
    view = workspace.require("checkpoint", name, not_by=tuple(not_by), skip=_is_rounded)
    results = CheckpointResults.read(view)
    if results.densified:
        raise WorkspaceError(
            f"{view.key} is densified: it has no low-rank layers",
            f"{verb} the checkpoint that ara truncate writes without --densify",
        )
    ranks = workspace.ancestor(view, "ranks")
    return Compressed(view, results, ranks, workspace.ancestor(ranks, "factors"))


def _is_rounded(view: StageView) -> bool:
    return CheckpointResults.read(view).rounding is not None


def _manifest(view: StageView) -> Manifest:
    assert view.manifest is not None
    return view.manifest
