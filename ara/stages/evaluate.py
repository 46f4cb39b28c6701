"""``ara eval``: the dense, the uniform and the chosen model side by side, on the same windows in the same run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ara.allocation.uniform import Uniform
from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults, label_of
from ara.artifacts.evaluation import DENSE
from ara.artifacts.factors import FactorsResults, factor_files, specs_of
from ara.artifacts.ranks import RanksSettings, read_allocation
from ara.config import EvalConfig
from ara.data.filespecs import is_file
from ara.data.texts import is_chat
from ara.errors import UsageError
from ara.evaluation.runtime import Runtime
from ara.evaluation.task_folders import TaskFolders, open_task_folders
from ara.evaluation.tasks import check_task, expand
from ara.models.checkpoint import load
from ara.models.context import window_length
from ara.models.low_rank import apply_factors
from ara.models.placement import choose_placement, torch_dtype
from ara.models.sources import ModelSource
from ara.models.weights import matching
from ara.names import MAX_NAME_BYTES
from ara.solver.problem import Budget
from ara.stages.common import NOT_PLAIN, Run, begin, model_of, open_task, placement_in
from ara.stages.measure import Measurement
from ara.stages.measure_elsewhere import MeasurementElsewhere, refuse_chats
from ara.stages.model_folders import ModelFolder, written
from ara.stages.modules import load_modules
from ara.stages.pieces import Pieces, Variant
from ara.stages.questions import Questions, Sources, load_sources, questions_for
from ara.workspace.manifest import digest
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes that the name of an export may add to the name of a result.
_EXPORT_ROOM = 40


@dataclass(frozen=True)
class RunnableExport:
    """An export of the checkpoint that can be measured; the caller provides it, since ``ara`` knows no other runtimes.

    Attributes:
        view: the export in the workspace.
        load: returns an object that is called like a model of transformers.
        weight_bytes: size of its weights on disk.
    """

    view: StageView
    load: Callable[[], Any]
    weight_bytes: int


FindExport = Callable[[Workspace, StageView], RunnableExport]


def evaluate(
    config: EvalConfig,
    run: Run,
    *,
    checkpoint: str | None = None,
    beside: Sequence[str] = (),
    name: str | None = None,
    find_export: FindExport | None = None,
    runtime: Runtime | None = None,
) -> StageView:
    """Measure perplexity and speed on texts, accuracy on tasks, and store them with the settings.

    Args:
        config: tasks, windows, device.
        run: workspace and reporter.
        checkpoint: NAME or STAGE/NAME; the latest by default.
        beside: NAME or STAGE/NAME of further checkpoints to measure.
        name: of the result; by default checkpoint, tasks, limit and further checkpoints.
        find_export: finds the export to measure as one more model, if ``config.backend`` is an export target.
        runtime: measures the models instead of torch, if ``config.backend`` is a runtime.

    Raises:
        UsageError: a checkpoint is given twice, the runtime cannot measure what is asked for, or there are several
            processes and another runtime than torch.
        UnavailableError: the runtime is not installed.
        AraError: a stage or text is missing, a stage is stale, a model yields NaN.
    """
    started, group = begin(name, checkpoint), run.group
    if group.size > 1 and (runtime is not None or find_export is not None):
        raise UsageError(
            f"--backend {config.backend} is given, and there are {group.size} processes", "run it without torchrun"
        )
    own = open_task_folders(config.include_path)
    names = expand(config.tasks, own)
    for task in names:
        check_task(task, run.report, own)
    if own is not None and not any(task in own for task in names):
        run.report.warn(f"--tasks {','.join(config.tasks)} names no task in {', '.join(config.include_path)}")
    if runtime is None:
        placement = choose_placement(config.device, config.dtype)
        run.check_offload(placement.device)
        group.check_device(placement.device, placement.dtype)
    else:
        placement = placement_in(runtime, config, run)
        refuse_chats(config, [name for name in names if is_chat(name)])
    with open_task("eval", run, started) as work:
        workspace = work.workspace
        truncated = workspace.require("checkpoint", checkpoint)
        others = _others(truncated, beside, workspace)
        run.report.step(f"Evaluating {truncated.key} on {', '.join(config.tasks)}")
        run.report.fact(placement.why)
        chosen = workspace.ancestor(truncated, "ranks")
        decomposition = workspace.ancestor(chosen, "factors")
        source = model_of(decomposition, run)
        seq_len = window_length(config.seq_len, source.config, runtime.spare_positions if runtime else 0)
        placed = {"device": placement.device, "dtype": placement.dtype}
        resolved = config.model_copy(update={**placed, "seq_len": seq_len})
        # The first checkpoint is the one that the result is about.
        exported, parents = None, [truncated, decomposition, *others]
        if find_export is not None:
            exported = find_export(workspace, truncated)
            parents.append(exported.view)
        with group.first_of_machine():
            sources = load_sources(names, own, run.report)
        group.agree(sources.digests, "what is read")
        settings = _recorded(resolved, sources, own)
        if name is None:
            limit = config.limit if sources.tasks else None
            name = result_name(truncated.name, config.tasks, sources.digests, limit, [view.key for view in others])
            name += f"-{exported.view.name}" if exported else f"-{config.backend}" if runtime else ""
        work.describe(name, settings, parents)
        if (done := work.done()) is not None:
            return done
        variants = _variants(truncated, chosen, decomposition, source, resolved, run)
        variants += _variants_beside(others, {variant.name for variant in variants}, resolved)
        if exported is not None:
            variants.append(_exported(truncated, exported))
        questions = questions_for(source, sources, resolved, run.report)
        asked = partial(_measurement, runtime, variants, label_of(truncated), questions, resolved, run)
        # In the dtype in which the models are held: that of the checkpoint's files may be another one.
        parameters = FactorsResults.read(decomposition).model_parameters
        dense_bytes = parameters * torch_dtype(placement.dtype).itemsize
        if group.writes:
            with work.writer(resumable=True, keep_after_nan=True) as stage:
                measurement = asked(stage)
                interleaved = measurement.run(dense_bytes)
                measurement.results(interleaved).write_file(stage)
        else:
            asked(None).run(dense_bytes)
        return work.view()


def _measurement(
    runtime: Runtime | None,
    variants: list[Variant],
    chosen: str,
    questions: Questions,
    config: EvalConfig,
    run: Run,
    stage: StageWriter | None,
) -> Pieces:
    asked = variants, chosen, questions, config, stage, run.report
    return Measurement(*asked, run.group) if runtime is None else MeasurementElsewhere(runtime, *asked)


def _recorded(config: EvalConfig, sources: Sources, own: TaskFolders | None) -> dict[str, Any]:
    """Return the settings for the manifest, with checksums of what is read."""
    return {
        # The number of conversations is a setting only where conversations are measured.
        **config.model_dump(mode="json", exclude=None if sources.chats else {"conversations"}),
        "text_sha256": sources.digests,
        **({} if own is None else {"task_files_sha256": own.digest}),
    }


def result_name(
    checkpoint: str, tasks: Sequence[str], digests: Mapping[str, str], limit: int | None, beside: Sequence[str] = ()
) -> str:
    """Return ``checkpoint-task-task-limit-N-beside-KEY``; a file contributes its stem and a checksum of its content.

    The limit is part of the name so that a limited run never replaces a full one. If the name would be too long,
    numbers and checksums replace the names of tasks and further checkpoints.
    """
    names = [
        f"{NOT_PLAIN.sub('_', Path(task.partition(':')[2]).stem)}-{digests[task][:8]}"
        if is_file(task)
        else NOT_PLAIN.sub("_", task)
        for task in tasks
    ]
    end = [] if limit is None else ["limit", str(limit)]
    others = ["beside", *(NOT_PLAIN.sub("_", key) for key in beside)] if beside else []
    if len("-".join([checkpoint, *names, *end, *others]).encode()) > MAX_NAME_BYTES - _EXPORT_ROOM:
        names = [str(len(tasks)), "tasks", digest(names)[:8]]
        others = ["beside", str(len(beside)), digest(list(beside))[:8]] if beside else []
    end += others
    return "-".join([checkpoint, *names, *end])


def _others(truncated: StageView, names: Sequence[str], workspace: Workspace) -> list[StageView]:
    """Return the checkpoints that are measured beside another one."""
    found: dict[str, StageView] = {}
    for name in names:
        view = workspace.require("checkpoint", name)
        if view.key == truncated.key or view.key in found:
            raise UsageError(f"--beside {view.key}: this checkpoint is measured already", "name each checkpoint once")
        found[view.key] = view
    return list(found.values())


def _variants(
    truncated: StageView,
    chosen: StageView,
    decomposition: StageView,
    source: ModelSource,
    config: EvalConfig,
    run: Run,
) -> list[Variant]:
    """Return dense, uniform at the same budget (unless the checkpoint is uniform itself), and the chosen checkpoint."""
    made = RanksSettings.read(chosen)
    layout = made.layout
    specs = specs_of(decomposition, layout)
    dtype, files = torch_dtype(config.dtype), factor_files(decomposition, specs)
    allocation = read_allocation(chosen, specs)
    if made.method == "uniform" and made.ranks_sha256 is None:
        uniform = allocation
    else:
        excluded = matching(specs, made.exclude)
        budget = Budget(allocation.cost, made.rank_multiple, made.min_rank, made.min_keep, excluded)
        uniform = Uniform().allocate(load_modules(decomposition, layout), budget)

    load_dense = partial(source.load_model, dtype, config.device)

    def load_uniform() -> PreTrainedModel:
        model = load_dense()
        apply_factors(model, uniform.low_rank(), files, layout, run.report)
        return model

    store = partial(written, source, dtype, files=files, layout=layout, report=run.report)
    variants = [Variant(DENSE, load_dense, 1.0, store=store)]
    if uniform != allocation:
        store_uniform = partial(store, ranks=uniform.low_rank())
        variants.append(Variant("uniform", load_uniform, uniform.keep(specs), store=store_uniform))
    variants.append(_stored(truncated, label_of(truncated), config))
    return variants


def _variants_beside(others: Sequence[StageView], taken: Collection[str], config: EvalConfig) -> list[Variant]:
    """Return the rows of further checkpoints, by their key where another row has their name."""
    names = [label_of(view) for view in others]
    return [
        _stored(view, view.key if name in taken or names.count(name) > 1 else name, config)
        for view, name in zip(others, names, strict=True)
    ]


def _stored(checkpoint: StageView, name: str, config: EvalConfig) -> Variant:
    results = CheckpointResults.read(checkpoint)
    folder = checkpoint.path / CHECKPOINT
    return Variant(
        name,
        partial(load, folder, config.device, config.dtype),
        results.linear_keep,
        disk_bytes=results.disk_bytes,
        store=lambda _: ModelFolder(folder, results.parameters),
    )


def _exported(truncated: StageView, exported: RunnableExport) -> Variant:
    results = CheckpointResults.read(truncated)
    figures = {"parameters": results.parameters, "weight_bytes": exported.weight_bytes}
    return Variant(exported.view.key, exported.load, results.linear_keep, figures)
