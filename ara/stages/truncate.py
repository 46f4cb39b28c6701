"""``ara truncate``: cut the factors at the allocated ranks and write a checkpoint that others can load."""

from __future__ import annotations

from typing import Any

from ara.config import TruncateConfig
from ara.layout_names import LayoutName
from ara.models.accounting import weight_bytes
from ara.models.checkpoint import check_loads, checkpoint_bytes, save_checkpoint
from ara.models.low_rank import apply_factors
from ara.models.placement import torch_dtype
from ara.reporting.model_card import model_card
from ara.reporting.sharing import display_name
from ara.stages.allocate import layout_of, read_allocation
from ara.stages.common import Run, already_done, begin, factor_files, model_of, specs_of
from ara.workspace.manifest import Manifest
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_name, parent_of

CHECKPOINT = "checkpoint"
# The model card within the result; ``ara report`` writes it again with what was measured.
CARD = f"{CHECKPOINT}/README.md"


def truncate(config: TruncateConfig, run: Run, *, allocation: str | None = None, name: str | None = None) -> StageView:
    """Write the compressed checkpoint of an allocation.

    Args:
        config: dtype, densify.
        run: workspace and reporter.
        allocation: which one; the latest by default.
        name: of the result; the allocation's name by default, with ``-dense`` when densified.

    Raises:
        AraError: a stage is missing or stale, the model has changed, the disk is full, what was written does not load.
    """
    started = begin(allocation, name)
    workspace = run.open()
    with workspace.lock(run.command):
        chosen = workspace.require("allocate", allocation)
        decomposition = decomposition_of(workspace, chosen)
        assert chosen.manifest is not None and decomposition.manifest is not None
        run.report.step(f"Truncating to {chosen.key}")
        dtype = decomposition.manifest.config["dtype"] if config.dtype == "auto" else config.dtype
        name = name or chosen.name + ("-dense" if config.densify else "")
        facts = {
            "config": config.model_copy(update={"dtype": dtype}),
            "model": chosen.manifest.model,
            "parents": (parent_of(chosen), parent_of(decomposition)),
        }
        done = workspace.finished("truncate", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        layout = layout_of(chosen)
        specs = specs_of(decomposition, layout)
        ranks = read_allocation(chosen, specs).low_rank()
        source = model_of(decomposition, run)
        model = source.load_model(torch_dtype(dtype), "cpu")
        dense_bytes = weight_bytes(model)
        # Layers that are multiplied back to dense weights at once are most exact as the factors themselves.
        built: LayoutName = "factors" if config.densify else layout
        apply_factors(model, ranks, factor_files(decomposition, specs), built, run.report)
        with workspace.writer("truncate", name, facts, command=run.command, started=started) as stage:
            folder = stage.folder / CHECKPOINT
            stored = weight_bytes(model)
            stage.results.update(
                {
                    "linear_keep": chosen.manifest.results["linear_keep"],
                    "model_keep": chosen.manifest.results["model_keep"],
                    "low_rank_layers": len(ranks),
                    "dense_layers": len(specs) - len(ranks),
                    "parameters": chosen.manifest.results["model_parameters"],
                    "weight_bytes": stored,
                    "dense_weight_bytes": dense_bytes,
                    "densified": config.densify,
                }
            )
            save_checkpoint(
                model,
                source.load_tokenizer(),
                folder,
                ranks=ranks,
                layout=layout,
                provenance=provenance(decomposition.manifest, chosen.manifest),
                dense=config.densify,
                max_shard_size=config.max_shard_size,
            )
            run.report.fact("checking that the checkpoint loads")
            check_loads(folder)
            stage.results["disk_bytes"] = checkpoint_bytes(folder)
            card = model_card(decomposition.manifest, chosen.manifest, stage.results, dtype)
            (stage.folder / CARD).write_text(card, encoding="utf-8")
            stage.loose(CARD)
        return workspace.view(f"truncate/{name}")


def decomposition_of(workspace: Workspace, allocation: StageView) -> StageView:
    """Return the decomposition that an allocation was made for, verified."""
    return workspace.require("decompose", parent_name(allocation, "decompose"))


def provenance(decomposition: Manifest, allocation: Manifest) -> dict[str, Any]:
    """Return what ``config.json`` says of how the checkpoint was made."""
    return {
        "ara_version": allocation.versions["ara"],
        "base_model": display_name(decomposition.model),
        "base_fingerprint": decomposition.model["fingerprint"],
        "decomposition": decomposition.config["method"],
        "decomposition_id": decomposition.id,
        "allocation": allocation.name,
        "allocation_id": allocation.id,
        "linear_keep": allocation.results["linear_keep"],
        "model_keep": allocation.results["model_keep"],
    }
