"""What ``ara decompose`` says and checks before it downloads or computes anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from ara.config import DecomposeConfig
from ara.decomposition.base import Decomposition
from ara.errors import AraError, UsageError
from ara.files import existing_folder
from ara.models.accounting import parameter_count
from ara.models.disk import disk_use, factor_bytes, storing
from ara.models.memory import Place
from ara.models.offload import copies
from ara.models.placement import Placement, torch_dtype
from ara.models.sources import ModelSource
from ara.models.weights import LinearSpec, find_linears
from ara.planning.decomposition import DecompositionPlan, plan_decomposition
from ara.progress import Reporter
from ara.stages.common import Run, Task
from ara.stages.disk_room import Need, check_room, mebibytes, say_needs
from ara.stages.moments import are_kept

# Where the weights are, in words.
_PLACES: dict[Place, str] = {
    "memory": "everything fits",
    "mapped": "the weights come and go as pages of files",
    "nowhere": "this is too little",
}


def linears_to_store(model: nn.Module, config: DecomposeConfig) -> list[LinearSpec]:
    """Return the linear layers of the decoder blocks, with the ranks to store.

    Raises:
        UsageError: experts are to share a factor, and there are none.
    """
    linears = find_linears(model, config.exclude)
    if config.share_experts and all(spec.experts == 1 for spec in linears):
        raise UsageError(
            f"--share-experts: {type(model).__name__} has no experts, or --exclude leaves them out",
            "leave out --share-experts",
        )
    return storing(linears, config.max_keep)


def prepare(
    source: ModelSource, config: DecomposeConfig, method: Decomposition, placement: Placement, task: Task, run: Run
) -> None:
    """Report what the work will take; check the disk before weights are downloaded or copied in another dtype.

    An interrupted run has stored some of the factors: then only the weights are checked here.

    Raises:
        DiskFullError: it has not.
    """
    download, plan = source.to_download(), _plan(config, method, source, placement)
    needs = [] if download is None else [Need("model", download.bytes, download.folder)]
    if plan is not None and plan.pages.copied:
        needs.append(Need(f"a copy of it in {placement.dtype}", plan.pages.copied, copies()))
    much = bool(needs)
    itemsize, root = torch_dtype(config.factors_dtype).itemsize, task.workspace.root
    if plan is None:
        model = source.empty_model()
        linears, parameters = linears_to_store(model, config), parameter_count(model)
    else:
        _say(plan, run.report)
        linears, parameters = list(plan.linears), plan.parameters
    use = disk_use(linears, parameters, itemsize)
    if not task.unfinished():
        free = shutil.disk_usage(existing_folder(root)).free - sum(need.bytes for need in needs) - use.factors
        needs.append(Need("factors", use.factors, root))
        if plan is not None and plan.moment_bytes and are_kept(plan.moment_bytes, config.keep_moments, free):
            needs.append(Need("second moments", plan.moment_bytes, root))
    needs.append(Need("a later checkpoint at most", use.checkpoint, root, later=True))
    if much:
        check_room(needs, less_room(linears, itemsize, config), run.report)
    else:
        say_needs(needs, run.report)


def _say(plan: DecompositionPlan, report: Reporter) -> None:
    """Report the memory of the plan, and what is done block by block."""
    stage = plan.stage
    report.fact(
        f"memory: about {mebibytes(stage.memory_bytes)} with {mebibytes(plan.weight_bytes)} of weights, at least "
        f"{mebibytes(stage.least_memory_bytes)}; {mebibytes(plan.free_memory)} are free: {_PLACES[stage.place]}"
    )
    if plan.chunks:
        parts = "all at once" if plan.chunks == 1 else f"in {plan.chunks} parts, one after the other"
        report.fact(f"{plan.blocks} blocks: their second moments {parts}, their factors block by block")


def _plan(
    config: DecomposeConfig, method: Decomposition, source: ModelSource, placement: Placement
) -> DecompositionPlan | None:
    """Return the plan; ``None`` if the model cannot be counted without numbers, or is refused for another reason."""
    with suppress(AraError):
        return plan_decomposition(config, method, source, placement)
    return None


def less_room(linears: Sequence[LinearSpec], itemsize: int, config: DecomposeConfig) -> str:
    """Return what to do if the disk is too small."""
    hint = "free some space or choose another workspace with -w"
    if config.max_keep is not None:
        return hint
    return f"{hint}; with --max-keep 1 the factors take {mebibytes(factor_bytes(storing(linears, 1), itemsize))}"
