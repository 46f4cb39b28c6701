"""``ara truncate``: cut the factors at the allocated ranks and write a checkpoint."""

from __future__ import annotations

from typing import Any

from ara.artifacts.checkpoint import CARD, CHECKPOINT, CheckpointResults
from ara.artifacts.factors import FactorsSettings, factor_files, specs_of
from ara.artifacts.ranks import RanksResults, layout_of, read_allocation
from ara.config import TruncateConfig
from ara.models.accounting import weight_bytes
from ara.models.checkpoint import check_loads, checkpoint_bytes
from ara.models.cutting import save_cut
from ara.models.placement import torch_dtype
from ara.progress import Reporter
from ara.reporting.model_card import model_card
from ara.reporting.sharing import display_name
from ara.stages.common import Run, begin, model_of, open_task
from ara.stages.full_rank_check import check_full_rank
from ara.workspace.manifest import Manifest
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter


def truncate(config: TruncateConfig, run: Run, *, allocation: str | None = None, name: str | None = None) -> StageView:
    """Write the compressed checkpoint of an allocation.

    Args:
        config: dtype, densify.
        run: workspace and reporter.
        allocation: NAME or STAGE/NAME of the ranks; the latest by default.
        name: of the result; the allocation's name by default, with ``-dense`` when densified.

    Raises:
        AraError: a stage is missing or stale, the model has changed, the disk is full, or the checkpoint does not load.
    """
    started = begin(name, allocation)
    with open_task("truncate", run, started) as task:
        chosen = task.workspace.require("ranks", allocation)
        decomposition = task.workspace.ancestor(chosen, "factors")
        assert chosen.manifest is not None and decomposition.manifest is not None
        run.report.step(f"Truncating to {chosen.key}")
        dtype = FactorsSettings.read(decomposition).stored_dtype if config.dtype == "auto" else config.dtype
        settings = config.model_copy(update={"dtype": dtype}).model_dump(mode="json", exclude={"check"})
        task.describe(name or chosen.name + ("-dense" if config.densify else ""), settings, (chosen, decomposition))
        done = task.done()
        if done is not None and not config.check:
            return done
        figures, layout = RanksResults.read(chosen), layout_of(chosen)
        specs = specs_of(decomposition, layout)
        ranks = read_allocation(chosen, specs).low_rank()
        source = model_of(decomposition, run)
        if config.check:
            check_full_rank(source, specs, factor_files(decomposition, specs), torch_dtype(dtype), run.report)
        if done is not None:
            return done
        stored = source.stored_model(torch_dtype(dtype))
        dense_bytes = weight_bytes(stored.model)
        with task.writer() as stage:
            folder = stage.folder / CHECKPOINT
            saved = save_cut(
                stored,
                source.load_processor(),
                folder,
                ranks=ranks,
                files=factor_files(decomposition, specs),
                provenance=provenance(decomposition.manifest, chosen.manifest),
                layout=layout,
                dense=config.densify,
                max_shard_size=config.max_shard_size,
                report=run.report,
            )
            results = CheckpointResults(
                linear_keep=figures.linear_keep,
                model_keep=figures.model_keep,
                low_rank_layers=len(ranks),
                dense_layers=len(specs) - len(ranks),
                parameters=figures.model_parameters,
                weight_bytes=saved.weight_bytes,
                dense_weight_bytes=dense_bytes,
                densified=config.densify,
                disk_bytes=checkpoint_bytes(folder),
            )
            finish_checkpoint(stage, results, decomposition.manifest, chosen.manifest, dtype, run.report)
        return task.view()


def finish_checkpoint(
    stage: StageWriter,
    results: CheckpointResults,
    decomposition: Manifest,
    allocation: Manifest,
    dtype: str,
    report: Reporter,
) -> None:
    """Check that the checkpoint just saved loads, and store its results and its model card.

    Raises:
        ModelError: it does not load.
    """
    report.fact("checking that the checkpoint loads")
    check_loads(stage.folder / CHECKPOINT)
    results.write(stage)
    (stage.folder / CARD).write_text(model_card(decomposition, allocation, results, dtype), encoding="utf-8")
    stage.loose(CARD)


def provenance(decomposition: Manifest, allocation: Manifest) -> dict[str, Any]:
    """Return how the checkpoint was made, for ``config.json``."""
    figures = RanksResults.read(allocation)
    return {
        "ara_version": allocation.versions["ara"],
        "base_model": display_name(decomposition.model),
        "base_fingerprint": decomposition.model["fingerprint"],
        "decomposition": decomposition.config["method"],
        "decomposition_id": decomposition.id,
        "allocation": allocation.name,
        "allocation_id": allocation.id,
        "linear_keep": figures.linear_keep,
        "model_keep": figures.model_keep,
    }
