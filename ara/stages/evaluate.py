"""``ara eval``: the dense, the uniform and the chosen model side by side, on the same windows in the same run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ara.allocation.uniform import Uniform
from ara.config import EvalConfig
from ara.data.texts import Documents, load_documents
from ara.evaluation.generation import prompt_ids
from ara.evaluation.task_folders import open_task_folders
from ara.evaluation.tasks import check_task, expand, is_text, load_tasks
from ara.jsonfile import dump
from ara.models.checkpoint import load
from ara.models.context import check_room, context_length
from ara.models.low_rank import apply_factors
from ara.models.placement import choose_placement, torch_dtype
from ara.models.sources import ModelSource
from ara.models.vocabulary import token_rows
from ara.models.weights import matching
from ara.names import MAX_NAME_BYTES
from ara.solver.problem import Budget
from ara.stages.allocate import layout_of, load_modules, read_allocation
from ara.stages.common import Run, already_done, begin, check_window, factor_files, label_of, model_of, specs_of
from ara.stages.measure import DENSE, Measurement, Questions, Variant, prompts_of
from ara.stages.truncate import CHECKPOINT, decomposition_of
from ara.workspace.manifest import digest
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_name, parent_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS_FILE = "results.json"
# Windows of the compression papers' evaluation.
_DEFAULT_SEQ_LEN = 2048
# Bytes that the name of an export may add to that of a result.
_EXPORT_ROOM = 40
# What must not stand in the name of a folder.
_NOT_PLAIN = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class RunnableExport:
    """An export of the checkpoint: this package does not know other runtimes.

    Attributes:
        view: the export in the workspace.
        load: returns an object that is called like a model of transformers.
        weight_bytes: size of its weights on the disk.
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
    name: str | None = None,
    find_export: FindExport | None = None,
) -> StageView:
    """Measure perplexity and speed on texts, accuracy on tasks, and store them with the settings.

    Args:
        config: tasks, windows, device.
        run: workspace and reporter.
        checkpoint: which result of ``ara truncate``; the latest by default.
        name: of the result; says checkpoint, tasks and limit by default.
        find_export: needed for ``config.backend`` other than torch.

    Raises:
        AraError: a stage is missing or stale, a text is missing, a model yields NaN.
    """
    started = begin(checkpoint, name)
    own = open_task_folders(config.include_path)
    names = expand(config.tasks, own)
    for task in names:
        check_task(task, run.report, own)
    if own is not None and not any(task in own for task in names):
        run.report.warn(f"no task in {', '.join(config.include_path)} is among --tasks {','.join(config.tasks)}")
    placement = choose_placement(config.device, config.dtype)
    workspace = run.open()
    with workspace.lock(run.command):
        truncated = workspace.require("truncate", checkpoint)
        assert truncated.manifest is not None
        run.report.step(f"Evaluating {truncated.key} on {', '.join(config.tasks)}")
        run.report.fact(placement.why)
        chosen = workspace.require("allocate", parent_name(truncated, "allocate"))
        decomposition = decomposition_of(workspace, chosen)
        source = model_of(decomposition, run)
        resolved = config.model_copy(
            update={
                "device": placement.device,
                "dtype": placement.dtype,
                "seq_len": window_length(config.seq_len, source.config),
            }
        )
        exported, parents = None, [truncated, decomposition]
        if config.backend != "torch":
            assert find_export is not None
            exported = find_export(workspace, truncated)
            parents.append(exported.view)
        texts = {task: load_documents(task, "evaluation", report=run.report) for task in names if is_text(task)}
        tasks = [task for name in names if not is_text(name) for task in load_tasks(name, run.report, own)]
        facts = {
            "config": {
                **resolved.model_dump(mode="json"),
                "text_sha256": {
                    **{task: documents.digest for task, documents in texts.items()},
                    **{task.name: task.digest for task in tasks},
                },
                **({} if own is None else {"task_files_sha256": own.digest}),
            },
            "model": truncated.manifest.model,
            "parents": tuple(parent_of(view) for view in parents),
        }
        if name is None:
            name = result_name(truncated.name, config.tasks, texts, config.limit if tasks else None)
            name += f"-{exported.view.name}" if exported else ""
        done = workspace.finished("eval", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        variants = _variants(truncated, chosen, decomposition, source, resolved, run)
        if exported is not None:
            variants.append(_exported(truncated, exported))
        tokenizer, context = source.load_tokenizer(), context_length(source.config)
        room = None if context is None else context - config.max_new_tokens
        if config.prompt is None:
            prompts = prompts_of(texts, config.continuations, tokenizer, room)
        else:
            prompts = [config.prompt]
            check_room(len(prompt_ids(tokenizer, config.prompt, chat=False)), config.max_new_tokens, context)
        questions = Questions(tokenizer, texts, tasks, prompts, token_rows(source.config))
        with workspace.writer(
            "eval", name, facts, command=run.command, resumable=True, keep_after_nan=True, started=started
        ) as stage:
            measurement = Measurement(variants, label_of(truncated), questions, resolved, stage, run.report)
            interleaved = measurement.run(truncated.manifest.results["dense_weight_bytes"])
            stage.results.update(_complete(measurement.results(), truncated), interleaved=interleaved)
            text = dump(stage.results, RESULTS_FILE, indent=1)
            (stage.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
        return workspace.view(f"eval/{name}")


def _complete(results: dict[str, Any], truncated: StageView) -> dict[str, Any]:
    """Add what follows from all rows together."""
    assert truncated.manifest is not None
    dense = results["variants"][DENSE]["parameters"]
    for row in results["variants"].values():
        row["model_keep"] = row["parameters"] / dense
    results["variants"][label_of(truncated)]["disk_bytes"] = truncated.manifest.results["disk_bytes"]
    return {"chosen": label_of(truncated), **results}


def result_name(checkpoint: str, tasks: Sequence[str], texts: Mapping[str, Documents], limit: int | None) -> str:
    """Return ``checkpoint-task-task-limit-N``; a file is named by its stem and the checksum of its text.

    The limit is part of it so that a few questions never take the place of all of them. Of tasks whose names are too
    many or too long stand their number and a checksum.
    """
    names = [
        f"{_NOT_PLAIN.sub('_', Path(task.removeprefix('file:')).stem)}-{texts[task].digest[:8]}"
        if task.startswith("file:")
        else _NOT_PLAIN.sub("_", task)
        for task in tasks
    ]
    end = [] if limit is None else ["limit", str(limit)]
    if len("-".join([checkpoint, *names, *end]).encode()) > MAX_NAME_BYTES - _EXPORT_ROOM:
        names = [str(len(tasks)), "tasks", digest(names)[:8]]
    return "-".join([checkpoint, *names, *end])


def window_length(asked: int | None, model_config: Any) -> int:
    """Return the tokens per window: ``asked``, or 2048 and at most what the model can read.

    Raises:
        UsageError: more was asked for than the model can read.
    """
    limit = check_window(asked or 0, model_config)
    return asked or min(_DEFAULT_SEQ_LEN, limit or _DEFAULT_SEQ_LEN)


def _variants(
    truncated: StageView,
    chosen: StageView,
    decomposition: StageView,
    source: ModelSource,
    config: EvalConfig,
    run: Run,
) -> list[Variant]:
    """List dense, uniform at the same budget, and the chosen checkpoint (which may itself be the uniform one)."""
    assert chosen.manifest is not None
    layout = layout_of(chosen)
    specs = specs_of(decomposition, layout)
    dtype, files = torch_dtype(config.dtype), factor_files(decomposition, specs)
    made, allocation = chosen.manifest.config, read_allocation(chosen, specs)
    if made["method"] == "uniform" and made["ranks_sha256"] is None:
        uniform = allocation
    else:
        excluded = matching(specs, made["exclude"])
        budget = Budget(allocation.cost, made["rank_multiple"], made["min_rank"], made["min_keep"], excluded)
        uniform = Uniform().allocate(load_modules(decomposition, layout), budget)

    def load_dense() -> PreTrainedModel:
        return source.load_model(dtype, config.device)

    def load_uniform() -> PreTrainedModel:
        model = load_dense()
        apply_factors(model, uniform.low_rank(), files, layout, run.report)
        return model

    def load_chosen() -> PreTrainedModel:
        return load(truncated.path / CHECKPOINT, config.device, config.dtype)

    variants = [Variant(DENSE, load_dense, 1.0)]
    if uniform != allocation:
        variants.append(Variant("uniform", load_uniform, uniform.keep(specs)))
    variants.append(Variant(label_of(truncated), load_chosen, allocation.keep(specs)))
    return variants


def _exported(truncated: StageView, exported: RunnableExport) -> Variant:
    """Return the row of an export."""
    assert truncated.manifest is not None
    results = truncated.manifest.results
    figures = {"parameters": results["parameters"], "weight_bytes": exported.weight_bytes}
    return Variant(exported.view.key, exported.load, results["linear_keep"], figures)
