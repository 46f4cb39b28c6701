"""``ara compare --keep``: measure all allocators on the same factors, budget and texts, in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocator
from ara.artifacts.comparison import PICTURE_FILE, ComparedMethod, ComparedText, ComparisonResults
from ara.artifacts.factors import FactorsResults, specs_of
from ara.artifacts.ranks_file import from_table, ranks_table
from ara.artifacts.training import training_cost
from ara.config import CompareConfig, method_options
from ara.config.latency import LatencyConfig, Objective
from ara.config.recover import NO_RECOVERY
from ara.config.sizes import FewBitsConfig
from ara.data.texts import check_text_spec, load_documents
from ara.data.tokens import TokenWindows, evaluation_windows
from ara.errors import NumericalError, UsageError
from ara.evaluation.layer_times import LayerRunner
from ara.jsonfile import dump
from ara.layout_names import LayoutName
from ara.masks.context import TuningContext
from ara.masks.rank_losses import nearest
from ara.models.context import window_length
from ara.models.vocabulary import token_rows
from ara.reporting.figures import rank_heat_maps
from ara.solver.problem import DENSE, Allocation, Budget, Module
from ara.stages.allocate import budget_of, refuse_layout, refuse_method, summary
from ara.stages.common import Run, begin, default_name, model_of, open_task
from ara.stages.compare_sizes import compare_sizes, refuse_with_sizes
from ara.stages.latency import (
    LATENCY,
    check_settings,
    keep_in_words,
    latency_words,
    measured_times,
    refuse_objective,
    timed_in,
)
from ara.stages.modules import load_modules
from ara.stages.stored_ranks import stored_ranks
from ara.stages.trainings import find_training, with_text_of, with_training
from ara.stages.tuning import open_tuning_context, placed
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter


def compare(
    config: CompareConfig,
    run: Run,
    *,
    factors: str | None = None,
    masks: str | None = None,
    name: str | None = None,
    layers: LayerRunner | None = None,
) -> StageView:
    """Allocate by every method and measure the results, without the guard; an interrupted run resumes.

    With sizes, every form of the model is measured instead, see :func:`ara.stages.compare_sizes.compare_sizes`.

    Args:
        config: budget, methods, texts; or sizes.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        masks: name of the training that ``ara`` uses; by default the one that fits best, see
            :func:`ara.stages.trainings.find_training`. If there is none, ``ara`` trains here with default options.
        name: of the result; consists of decomposition (unless the default one) and keep by default.
        layers: times layers for ``--objective latency``; required if ``config.latency_backend`` is not torch.

    Raises:
        AraError: no decomposition, an unknown method, a budget that cannot be met, a missing text.
    """
    if config.size:
        refuse_with_sizes(config, masks)
        return compare_sizes(config, run, factors=factors, name=name)
    if config.recover != NO_RECOVERY:
        raise UsageError(
            f"--recover {config.recover} is given without --size",
            "allocators are compared as they are; give sizes, or omit --recover",
        )
    started = begin(name, factors, masks)
    check_settings(config)
    methods = config.methods or methods_for(config.layout, config.objective)
    for method in methods:
        refuse_layout(method, config.layout)
        refuse_objective(method, config.objective)
    for task in config.tasks:
        check_text_spec(task)
    with open_task("compare", run, started) as work:
        workspace = work.workspace
        decomposition = workspace.require("factors", factors)
        methods = _possible(methods, config, decomposition, run)
        run.report.step(f"Comparing {len(methods)} allocators at {keep_in_words(config, config.keep)}")
        trained = find_training(workspace, decomposition, config.layout, config.keep, run.report, masks)
        resolved = placed(with_text_of(config, trained, run.report), run)
        source = model_of(decomposition, run)
        resolved = resolved.model_copy(
            update={"methods": methods, "eval_seq_len": window_length(config.eval_seq_len, source.config)}
        )
        if config.objective == LATENCY:
            resolved, layers = timed_in(resolved, layers)
        else:
            layers = None
        texts = {task: load_documents(task, "evaluation", report=run.report) for task in config.tasks}
        unused = {"size", "recover", "embedding_bits", "blocks", *FewBitsConfig.model_fields}
        unused |= set() if layers is not None else set(LatencyConfig.model_fields)
        settings = {
            **resolved.model_dump(mode="json", exclude=unused),
            "text_sha256": {task: documents.digest for task, documents in texts.items()},
        }
        words = latency_words(config)
        name = name or default_name(decomposition.name, *words, keep=config.keep, layout=config.layout)
        work.describe(name, settings, [view for view in (decomposition, trained) if view])
        if (done := work.done()) is not None:
            return done
        modules = load_modules(decomposition, config.layout)
        specs = [module.spec for module in modules]
        times = None if layers is None else measured_times(resolved, specs, layers, workspace, run)
        budget = budget_of(resolved, specs, resolved.keep, times)
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
        with work.writer(seed=config.seed, resumable=True) as stage:
            # No cached table: the time of every method includes all of its work.
            tuning = open_tuning_context(decomposition, specs, resolved, workspace, run)
            context = with_training(replace(tuning, table_cache=None), trained)
            rows = _measure_all(resolved, modules, budget, context, windows, trained, stage, run)
            parameters = FactorsResults.read(decomposition).model_parameters
            _conclude(resolved, modules, parameters, rows, stage, trained)
        return work.view()


def _possible(methods: tuple[str, ...], config: CompareConfig, decomposition: StageView, run: Run) -> tuple[str, ...]:
    """Return the methods that can work with the stored ranks.

    Raises:
        UsageError: one that was asked for cannot, or the budget needs ranks that are not stored.
    """
    stored = stored_ranks(decomposition)
    if config.objective != LATENCY:
        stored.check_keep(specs_of(decomposition, config.layout), config.keep, run.report)
    for method in config.methods:
        refuse_method(method, stored)
    left = [method for method in methods if ALLOCATORS.load(method).all_ranks] if stored.lacking else []
    if left:
        run.report.fact(f"{', '.join(left)} are left out: they need the factors of all ranks")
    return tuple(method for method in methods if method not in left)


def gap_closed(loss: float, uniform: float, dense: float) -> float | None:
    """Return (uniform − loss) / (uniform − dense) of mean negative log-likelihoods; ``None`` if there is no gap."""
    return (uniform - loss) / (uniform - dense) if uniform > dense else None


def methods_for(layout: LayoutName, objective: Objective = "parameters") -> tuple[str, ...]:
    """Return the allocators that support a layout and an objective."""
    kinds = {name: ALLOCATORS.load(name) for name in ALLOCATORS.names()}
    return tuple(name for name, kind in kinds.items() if layout in kind.layouts and objective in kind.objectives)


def _measure_all(
    config: CompareConfig,
    modules: list[Module],
    budget: Budget,
    context: TuningContext,
    windows: dict[str, TokenWindows],
    trained: StageView | None,
    stage: StageWriter,
    run: Run,
) -> dict[str, ComparedMethod]:
    """Measure the dense model and every method not measured yet; returns all rows."""
    rows = dict(ComparisonResults.parse(stage.results).methods)

    def keep(name: str, row: ComparedMethod) -> None:
        rows[name] = row
        ComparisonResults(rows).write(stage)
        stage.text(f"{name}.json", dump(row.plain(), name))

    if DENSE not in rows:
        specs = [module.spec for module in modules]
        dense = Allocation.of_ranks(specs, dict.fromkeys((spec.name for spec in specs), None))
        keep(DENSE, ComparedMethod(ranks={}, **_quality(dense, config, context, windows, DENSE)))
    for method in config.methods:
        if method in rows:
            run.report.fact(f"{method} was measured by an interrupted run")
            continue
        run.report.step(f"Allocating by {method}")
        try:
            row = _measure(method, config, modules, budget, context, windows)
            if method == "ara" and trained is not None and context.learned:
                spent = training_cost(trained, nearest(context.learned, config.keep).keep)
                assert row.seconds is not None and row.backward_passes is not None
                passes = row.backward_passes + spent.backward_passes
                row = replace(row, seconds=row.seconds + spent.seconds, backward_passes=passes)
        except NumericalError as error:
            # NaN in one method is a result and does not stop the others.
            run.report.warn(f"{method}: {error}")
            row = ComparedMethod(error=str(error))
        keep(method, row)
    return rows


def _measure(
    method: str,
    config: CompareConfig,
    modules: list[Module],
    budget: Budget,
    context: TuningContext,
    windows: dict[str, TokenWindows],
) -> ComparedMethod:
    kind = ALLOCATORS.load(method)
    allocator: Allocator = kind(method_options(kind.Options, {}))
    specs = [module.spec for module in modules]
    passes, begun = context.model.backward_passes, time.monotonic()
    allocation = allocator.allocate(modules, budget, context if allocator.needs_model else None)
    seconds = time.monotonic() - begun
    return ComparedMethod(
        ranks=ranks_table(allocation),
        linear_keep=allocation.keep(specs),
        time_keep=budget.times.share(specs, allocation.ranks) if budget.times else None,
        dense_layers=allocation.dense_count(),
        seconds=seconds,
        backward_passes=context.model.backward_passes - passes,
        **_quality(allocation, config, context, windows, method),
    )


def _quality(
    allocation: Allocation, config: CompareConfig, context: TuningContext, windows: dict[str, TokenWindows], name: str
) -> dict[str, Any]:
    """Return the held-out loss and the results on texts, as fields of :class:`ComparedMethod`."""
    context.model.use(allocation.ranks)
    held_out = float(
        context.model.nll(context.held_out, context.batch_size, context.report, f"Reading held-out text: {name}").mean()
    )
    _check_finite(held_out, name, "held-out text")
    tasks = {}
    for task, text in windows.items():
        losses = context.model.nll(text.ids, config.eval_batch_size, context.report, f"Reading {task}: {name}")
        loss = float(losses.mean())
        _check_finite(loss, name, task)
        tasks[task] = ComparedText(loss, math.exp(loss), tuple(losses.tolist()))
    context.model.use_dense()
    return {"held_out": held_out, "tasks": tasks}


def _check_finite(loss: float, name: str, text: str) -> None:
    if not math.isfinite(loss):
        raise NumericalError(f"{name} gives a loss of {loss} on {text}", "try --dtype float32")


def _conclude(
    config: CompareConfig,
    modules: list[Module],
    model_parameters: int,
    rows: dict[str, ComparedMethod],
    stage: StageWriter,
    trained: StageView | None,
) -> None:
    """Add the gap closed and the kept parameters, and write the JSON and the picture."""
    specs = [module.spec for module in modules]
    allocations = {name: from_table(row.ranks, specs) for name, row in rows.items() if name != DENSE and row.ranks}
    dense = rows[DENSE].tasks or {}
    uniform = rows["uniform"].tasks if "uniform" in rows else None
    concluded = {
        name: replace(
            row,
            tasks=None if row.tasks is None else _gaps(row.tasks, uniform, dense),
            model_keep=summary(allocations[name], specs, model_parameters).model_keep if name in allocations else None,
        )
        for name, row in rows.items()
    }
    (stage.folder / PICTURE_FILE).write_bytes(
        rank_heat_maps(allocations, specs, f"Share kept at {keep_in_words(config, config.keep)}")
    )
    ComparisonResults(concluded, trained.name if trained else None).write_file(stage)


def _gaps(
    tasks: Mapping[str, ComparedText], uniform: Mapping[str, ComparedText] | None, dense: Mapping[str, ComparedText]
) -> dict[str, ComparedText]:
    """Return the results of one allocation with the gap that it closes."""
    if not uniform:
        return dict(tasks)
    return {
        task: replace(text, gap_closed=gap_closed(text.nll, uniform[task].nll, dense[task].nll))
        for task, text in tasks.items()
    }
