"""``ara compare``: all allocators side by side, on the same factors, the same budget and the same text, in one run."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocator
from ara.artifacts.ranks import from_table, ranks_table
from ara.artifacts.training import find_training, training_cost, with_text_of, with_training
from ara.config import CompareConfig, method_options
from ara.data.texts import check_text_spec, load_documents
from ara.data.tokens import TokenWindows, evaluation_windows
from ara.errors import NumericalError
from ara.jsonfile import dump
from ara.layout_names import LayoutName
from ara.masks.context import TuningContext
from ara.masks.rank_losses import nearest
from ara.models.vocabulary import token_rows
from ara.reporting.figures import rank_heat_maps
from ara.solver.problem import DENSE, Allocation, Module
from ara.stages.allocate import budget_of, load_modules, refuse_layout, summary
from ara.stages.common import Run, already_done, begin, default_name, model_of
from ara.stages.evaluate import window_length
from ara.stages.tuning import open_tuning_context, placed
from ara.workspace.view import StageView, parent_of
from ara.workspace.writer import StageWriter

RESULTS_FILE = "results.json"
PICTURE_FILE = "ranks.svg"


def compare(
    config: CompareConfig, run: Run, *, factors: str | None = None, masks: str | None = None, name: str | None = None
) -> StageView:
    """Allocate by every method, measure each, and store figures, ranks and a picture; finished methods are kept.

    No guard is at work here: every method is shown as it is.

    Args:
        config: budget, methods, texts.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        masks: name of the training that ``ara`` uses; by default the one that fits best, see
            :func:`ara.artifacts.training.find_training`. Where there is none, ``ara`` trains here with default options.
        name: of the result; says decomposition (unless it is the default one) and keep by default.

    Raises:
        AraError: no decomposition, an unknown method, a budget that cannot be met, a missing text.
    """
    started = begin(factors, masks, name)
    methods = config.methods or methods_for(config.layout)
    for method in methods:
        refuse_layout(method, config.layout)
    for task in config.tasks:
        check_text_spec(task)
    workspace = run.open()
    with workspace.lock(run.command):
        decomposition = workspace.require("decompose", factors)
        assert decomposition.manifest is not None
        run.report.step(f"Comparing {len(methods)} allocators at keep {config.keep:g}")
        trained = find_training(workspace, decomposition, config.layout, config.keep, run.report, masks)
        resolved = placed(with_text_of(config, trained, run.report), run)
        source = model_of(decomposition, run)
        resolved = resolved.model_copy(
            update={"methods": methods, "eval_seq_len": window_length(config.eval_seq_len, source.config)}
        )
        texts = {task: load_documents(task, "evaluation", report=run.report) for task in config.tasks}
        facts = {
            "config": {
                **resolved.model_dump(mode="json"),
                "text_sha256": {task: documents.digest for task, documents in texts.items()},
            },
            "model": decomposition.manifest.model,
            "parents": tuple(parent_of(view) for view in (decomposition, trained) if view),
        }
        name = name or default_name(decomposition.name, keep=config.keep, layout=config.layout)
        done = workspace.finished("compare", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        modules = load_modules(decomposition, config.layout)
        specs = [module.spec for module in modules]
        budget_of(resolved, specs, resolved.keep)
        tokenizer = source.load_tokenizer()
        windows = {
            task: evaluation_windows(
                documents,
                tokenizer,
                seq_len=resolved.eval_seq_len or 0,
                max_windows=resolved.max_windows,
                rows=token_rows(source.config),
            )
            for task, documents in texts.items()
        }
        with workspace.writer(
            "compare", name, facts, command=run.command, seed=config.seed, resumable=True, started=started
        ) as stage:
            # Every method pays for what it measures: no table of another command.
            lab = replace(open_tuning_context(decomposition, specs, resolved, workspace, run), table_cache=None)
            context = with_training(lab, trained)
            _measure_all(resolved, modules, context, windows, trained, stage, run)
            parameters = decomposition.manifest.results["model_parameters"]
            _conclude(resolved, modules, parameters, stage, trained)
        return workspace.view(f"compare/{name}")


def gap_closed(loss: float, uniform: float, dense: float) -> float | None:
    """Return (uniform − loss) / (uniform − dense) of mean negative log-likelihoods; ``None`` where there is no gap."""
    return (uniform - loss) / (uniform - dense) if uniform > dense else None


def methods_for(layout: LayoutName) -> tuple[str, ...]:
    """Return the allocators that know ``layout``."""
    return tuple(name for name in ALLOCATORS.names() if layout in ALLOCATORS.load(name).layouts)


def _measure_all(
    config: CompareConfig,
    modules: list[Module],
    context: TuningContext,
    windows: dict[str, TokenWindows],
    trained: StageView | None,
    stage: StageWriter,
    run: Run,
) -> None:
    """Measure dense and every method that an interrupted run has not measured."""
    rows: dict[str, Any] = stage.results.setdefault("methods", {})
    if DENSE not in rows:
        specs = [module.spec for module in modules]
        dense = Allocation.of_ranks(specs, dict.fromkeys((spec.name for spec in specs), None))
        rows[DENSE] = {"ranks": {}, **_quality(dense, config, context, windows, DENSE)}
        stage.text(f"{DENSE}.json", dump(rows[DENSE], DENSE))
    for method in config.methods:
        if method in rows:
            run.report.fact(f"{method} was measured before the interruption")
            continue
        run.report.step(f"Allocating by {method}")
        try:
            rows[method] = _measure(method, config, modules, context, windows)
            if method == "ara" and trained is not None and context.learned:
                used = nearest(context.learned, config.keep)
                for name, value in training_cost(trained, used.keep).items():
                    rows[method][name] += value
        except NumericalError as error:
            # One method that yields NaN is a result; the others are still of use.
            run.report.warn(f"{method}: {error}")
            rows[method] = {"error": str(error)}
        stage.text(f"{method}.json", dump(rows[method], method))


def _measure(
    method: str, config: CompareConfig, modules: list[Module], context: TuningContext, windows: dict[str, TokenWindows]
) -> dict[str, Any]:
    kind = ALLOCATORS.load(method)
    allocator: Allocator = kind(method_options(kind.Options, {}))
    specs = [module.spec for module in modules]
    budget = budget_of(config, specs, config.keep)
    passes, begun = context.model.backward_passes, time.monotonic()
    allocation = allocator.allocate(modules, budget, context if allocator.needs_model else None)
    seconds = time.monotonic() - begun
    return {
        "ranks": ranks_table(allocation),
        "linear_keep": allocation.keep(specs),
        "dense_layers": allocation.dense_count(),
        "seconds": seconds,
        "backward_passes": context.model.backward_passes - passes,
        **_quality(allocation, config, context, windows, method),
    }


def _quality(
    allocation: Allocation, config: CompareConfig, context: TuningContext, windows: dict[str, TokenWindows], name: str
) -> dict[str, Any]:
    """Return held-out loss and perplexities of an allocation."""
    context.model.use(allocation.ranks)
    held_out = float(
        context.model.nll(context.held_out, context.batch_size, context.report, f"Reading held-out text: {name}").mean()
    )
    _refuse_infinite(held_out, name, "held-out text")
    tasks = {}
    for task, text in windows.items():
        losses = context.model.nll(text.ids, config.eval_batch_size, context.report, f"Reading {task}: {name}")
        loss = float(losses.mean())
        _refuse_infinite(loss, name, task)
        tasks[task] = {"nll": loss, "perplexity": math.exp(loss), "window_nlls": losses.tolist()}
    context.model.use_dense()
    return {"held_out": held_out, "tasks": tasks}


def _refuse_infinite(loss: float, name: str, text: str) -> None:
    if not math.isfinite(loss):
        raise NumericalError(f"{name} gives a loss of {loss} on {text}", "try --dtype float32")


def _conclude(
    config: CompareConfig, modules: list[Module], model_parameters: int, stage: StageWriter, trained: StageView | None
) -> None:
    """Add what needs all rows: gap closed; write the JSON and the picture."""
    rows = stage.results["methods"]
    specs = [module.spec for module in modules]
    for row in rows.values():
        if "tasks" not in row:
            continue
        for task, figures in row["tasks"].items():
            uniform = rows.get("uniform", {}).get("tasks")
            figures["gap_closed"] = (
                gap_closed(figures["nll"], uniform[task]["nll"], rows[DENSE]["tasks"][task]["nll"]) if uniform else None
            )
    allocations = {
        name: from_table(row["ranks"], specs) for name, row in rows.items() if name != DENSE and "ranks" in row
    }
    for name, allocation in allocations.items():
        rows[name]["model_keep"] = summary(allocation, specs, model_parameters)["model_keep"]
    stage.results["training"] = trained.name if trained else None
    (stage.folder / PICTURE_FILE).write_bytes(rank_heat_maps(allocations, specs, f"Share kept at keep {config.keep:g}"))
    text = dump(stage.results, RESULTS_FILE, indent=1)
    (stage.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
