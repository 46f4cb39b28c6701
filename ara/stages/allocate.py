"""``ara allocate``: choose a rank, or dense, for every layer under one budget; the factors are only read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocator
from ara.allocation.forms import JOINT
from ara.allocation.guard import Verdict, compare_candidates
from ara.allocation.uniform import Uniform
from ara.artifacts.factors import FactorsResults, specs_of
from ara.artifacts.ranks import GuardResults, KindRanks, LatencyResults, RanksResults
from ara.artifacts.ranks_file import RANKS_FILE, FewBits, ranks_document, read_few_bits
from ara.config import AllocateConfig, BudgetConfig, PlacementConfig, TuningConfig, method_options
from ara.config.latency import LatencyConfig
from ara.config.sizes import FewBitsConfig, few_bits
from ara.errors import UsageError, WorkspaceError
from ara.evaluation.layer_times import LayerRunner
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.masks.context import TuningContext
from ara.models.weights import LinearSpec, matching
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.stored_ranks import StoredRanks
from ara.solver.times import TimeTable
from ara.stages.allocate_bytes import SIZES, allocate_bytes, refuse_with_size, size_name
from ara.stages.common import Run, begin, default_name, open_task
from ara.stages.given_ranks import from_file, layout_in, refuse_method_settings
from ara.stages.latency import (
    LATENCY,
    check_settings,
    keep_in_words,
    latency_results,
    latency_words,
    measured_times,
    refuse_objective,
    timed_in,
)
from ara.stages.modules import load_modules
from ara.stages.stored_ranks import stored_ranks
from ara.stages.trainings import find_training, require_training, with_text_of, with_training
from ara.stages.tuning import open_tuning_context, placed
from ara.workspace.manifest import file_sha256
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

# Resolved to `ara` if trained masks exist, else to `sensitivity`.
AUTO = "auto"


def allocate(
    config: AllocateConfig,
    run: Run,
    *,
    factors: str | None = None,
    name: str | None = None,
    ranks: Path | None = None,
    masks: str | None = None,
    layers: LayerRunner | None = None,
) -> StageView:
    """Allocate ranks and store them as ``ranks.json``.

    Args:
        config: budget and method.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        name: of the result; consists of method and keep by default.
        ranks: read the ranks from this file instead; with ``config.keep`` they must meet that budget.
        masks: name of the training that ``--method ara`` uses; by default the one that fits best, see
            :func:`ara.stages.trainings.find_training`.
        layers: times layers for ``--objective latency``; required if ``config.latency_backend`` is not torch.

    Raises:
        AraError: no decomposition, a budget that cannot be met, a ranks file that does not fit.
    """
    started = begin(name, factors, masks)
    if ranks is not None and masks is not None:
        raise UsageError(
            f"--ranks FILE and --masks {masks} are both given", "the file gives every rank: use one of them"
        )
    _refuse_measuring(config, run)
    with open_task("allocate", run, started) as task:
        decomposition = task.workspace.require("factors", factors)
        config, trained = _settled(config, task.workspace, decomposition, ranks, masks, run)
        if config.objective == LATENCY:
            config, layers = timed_in(config, layers)
        else:
            layers = None
        parents = [view for view in (decomposition, trained) if view]
        task.describe(name or _name(config, decomposition.name, ranks), _recorded(config, ranks), parents)
        if (done := task.done()) is not None:
            return done
        specs = specs_of(decomposition, config.layout)
        verdict, size, latency = None, None, None
        if ranks:
            allocation = from_file(config, ranks, specs)
        elif config.asked_sizes:
            allocation, verdict, size = allocate_bytes(config, decomposition, task.workspace, run)
        else:
            allocation, verdict, latency = _by_method(config, decomposition, trained, layers, task.workspace, run)
        guard = GuardResults.of(verdict.winner, verdict.held_out, verdict.stderr) if verdict else None
        figures = summary(allocation, specs, FactorsResults.read(decomposition).model_parameters)
        if run.group.writes:
            results = replace(figures, guard=guard, size=size, latency=latency)
            with task.writer() as stage:
                _write(stage, config, ranks, allocation, specs, results)
        return task.view()


def _refuse_measuring(config: AllocateConfig, run: Run) -> None:
    """Check that several processes do not measure times or bits, which they do not share.

    Raises:
        UsageError: they would.
    """
    if run.group.size > 1 and (config.asked_sizes or config.objective == LATENCY):
        given = config.asked_sizes[0] if config.asked_sizes else f"--objective {LATENCY}"
        raise UsageError(f"{given} is given, and there are {run.group.size} processes", "run it without torchrun")


def _settled(
    config: AllocateConfig,
    workspace: Workspace,
    decomposition: StageView,
    ranks: Path | None,
    masks: str | None,
    run: Run,
) -> tuple[AllocateConfig, StageView | None]:
    """Return ``config`` with method, text, layout, device and dtype resolved, and the training that the method uses.

    Raises:
        UsageError: settings contradict each other, or there is no budget.
    """
    check_settings(config)
    if ranks is not None:
        run.report.step(f"Reading ranks from {ranks}")
        config = config.model_copy(update={"layout": layout_in(ranks, config.layout)})
        refuse_method_settings(config)
        # read_ranks reports a file that cannot be read.
        digest = {"ranks_sha256": file_sha256(ranks)} if ranks.is_file() else {}
        return config.model_copy(update=digest), None
    trained = None
    if config.asked_sizes:
        refuse_with_size(config, masks)
        stored_ranks(decomposition).need_all(config.asked_sizes[0], "give --keep instead")
        config = config.model_copy(update={"keep": None, "method": JOINT})
        run.report.step(f"Allocating ranks and bits for {config.asked_sizes[0]}")
    elif config.keep is None:
        raise UsageError("no budget given", "add --keep 0.8, for example")
    else:
        config, trained = _resolve_method(config, workspace, decomposition, masks, run)
        config = with_text_of(config, trained, run.report)
        refuse_layout(config.method, config.layout)
        refuse_objective(config.method, config.objective)
        stored = stored_ranks(decomposition)
        refuse_method(config.method, stored)
        assert config.keep is not None
        if config.objective != LATENCY:
            stored.check_keep(specs_of(decomposition, config.layout), config.keep, run.report)
        run.report.step(f"Allocating ranks by {config.method} at {keep_in_words(config, config.keep)}")
    return (placed(config, run) if _needs_model(config) or _timed_in_torch(config) else config), trained


def _write(
    stage: StageWriter,
    config: AllocateConfig,
    ranks: Path | None,
    allocation: Allocation,
    specs: list[LinearSpec],
    results: RanksResults,
) -> None:
    """Store the ranks and their figures."""
    left = ("kinds", "guard", "size", "latency")
    about = {"method": "file" if ranks else config.method}
    about.update({key: value for key, value in results.plain().items() if key not in left})
    chosen = FewBits(few_bits(config.embedding_bits), config.blocks[0], config.zero_points)
    few = read_few_bits(ranks) if ranks else chosen
    document = ranks_document(allocation, config.layout, about, specs, few)
    (stage.folder / RANKS_FILE).write_text(document, encoding="utf-8")
    results.write(stage)


def _resolve_method(
    config: AllocateConfig, workspace: Workspace, decomposition: StageView, masks: str | None, run: Run
) -> tuple[AllocateConfig, StageView | None]:
    """Return ``config`` with ``auto`` replaced by a method, and the training that the method uses."""
    if config.method != AUTO:
        return config, _training(config, workspace, decomposition, masks, run)
    if config.options:
        raise UsageError(f"-O {next(iter(config.options))}=… is given without a method", "add --method NAME")
    trained = find_training(workspace, decomposition, config.layout, config.keep, run.report, masks)
    method, why = ("ara", "") if trained else ("sensitivity", "no ")
    run.report.fact(f"method {method}: there are {why}trained masks for {decomposition.key}")
    return config.model_copy(update={"method": method}), trained


def refuse_layout(method: str, layout: LayoutName) -> None:
    """Check that an allocator supports a layout.

    Raises:
        UsageError: it does not, or there is no such allocator.
    """
    known = ALLOCATORS.load(method).layouts
    if layout not in known:
        raise UsageError(
            f"--method {method} does not support --layout {layout}", f"use --layout {known[0]}, or another method"
        )


def refuse_method(method: str, stored: StoredRanks) -> None:
    """Check that a decomposition stores what an allocator needs.

    Raises:
        UsageError: the method needs all ranks, and it does not store them.
    """
    if ALLOCATORS.load(method).all_ranks:
        stored.need_all(f"--method {method}", "use another method")


def _needs_model(config: AllocateConfig) -> bool:
    return bool(config.asked_sizes or ALLOCATORS.load(config.method).needs_model)


def _timed_in_torch(config: AllocateConfig) -> bool:
    return config.objective == LATENCY and config.latency_backend == "torch"


def _recorded(config: AllocateConfig, ranks: Path | None) -> dict[str, Any]:
    """Return the settings for the manifest; those of the tuning context only if the method uses the model."""
    # Without a size these settings mean nothing, and results of earlier versions have none.
    sized = {*FewBitsConfig.model_fields, *SIZES, "blocks", "bits", "embedding_bits"}
    left = sized if not config.asked_sizes else {name for name in SIZES if getattr(config, name) is None}
    if config.objective != LATENCY:
        left |= set(LatencyConfig.model_fields)
    values = config.model_dump(mode="json", exclude=left)
    if ranks is None and _needs_model(config):
        return values
    unused = {*TuningConfig.model_fields, "guard"}
    if _timed_in_torch(config):
        unused -= set(PlacementConfig.model_fields)
    return {key: value for key, value in values.items() if key not in unused}


def _training(
    config: AllocateConfig, workspace: Workspace, decomposition: StageView, masks: str | None, run: Run
) -> StageView | None:
    """Return the result of ``ara train-masks`` that ``--method ara`` uses."""
    if config.method != "ara":
        if masks is not None:
            raise UsageError(f"--masks {masks} and --method {config.method} are both given", "use --method ara")
        return None
    if config.options:
        raise UsageError(
            f"--method ara takes no options here, got {next(iter(config.options))}", "give it to ara train-masks"
        )
    found = find_training(workspace, decomposition, config.layout, config.keep, run.report, masks)
    if found is None and not workspace.views("training"):
        layout = "" if config.layout == DEFAULT_LAYOUT else f" --layout {config.layout}"
        raise WorkspaceError(
            f"{workspace.root} has no trained masks", f"run first: ara train-masks --keep {config.keep:g}{layout}"
        )
    if found is None:
        # There are some, but none fits: report the problem of the latest one.
        latest = require_training(workspace, decomposition, None)
        found = find_training(workspace, decomposition, config.layout, config.keep, run.report, latest.name)
    return found


def _name(config: AllocateConfig, factors: str, ranks: Path | None) -> str:
    """Return a name of decomposition, method and keep, such as ``energy-0.80``, or of the ranks file."""
    if ranks is not None:
        return default_name(factors, ranks.stem)
    if config.asked_sizes:
        return default_name(factors, JOINT, size_name(config), layout=config.layout)
    multiple = [f"x{config.rank_multiple}"] if config.rank_multiple > 1 else []
    parts = [config.method, *latency_words(config)]
    return "-".join([default_name(factors, *parts, keep=config.keep, layout=config.layout), *multiple])


def summary(allocation: Allocation, specs: list[LinearSpec], model_parameters: int) -> RanksResults:
    """Return the parameters that an allocation keeps: in the linear layers, in the model, and by kind of layer."""
    linear_parameters = sum(spec.dense_cost for spec in specs)
    parameters = allocation.parameters(specs)
    kept = model_parameters - linear_parameters + parameters
    kinds = {}
    for kind in dict.fromkeys(spec.kind for spec in specs):
        members = [spec for spec in specs if spec.kind == kind]
        ranks = [rank for spec in members if (rank := allocation.ranks[spec.name]) is not None]
        kinds[kind] = KindRanks(
            layers=len(members),
            shape=(members[0].m, members[0].n),
            dense=len(members) - len(ranks),
            rank_min=min(ranks, default=None),
            rank_mean=sum(ranks) / len(ranks) if ranks else None,
            rank_max=max(ranks, default=None),
            keep=allocation.keep(members),
        )
    return RanksResults(
        linear_parameters_dense=linear_parameters,
        linear_parameters=parameters,
        linear_keep=parameters / linear_parameters,
        model_parameters_dense=model_parameters,
        model_parameters=kept,
        model_keep=kept / model_parameters,
        dense_layers=allocation.dense_count(),
        kinds=kinds,
    )


def budget_of(config: BudgetConfig, specs: list[LinearSpec], keep: float, times: TimeTable | None = None) -> Budget:
    """Return the budget at ``keep`` with the limits of ``config``: of parameters, or of time if ``times`` are given."""
    dense = matching(specs, config.exclude)
    return Budget.for_keep(specs, keep, config.rank_multiple, config.min_rank, config.min_keep, dense, times)


def _by_method(
    config: AllocateConfig,
    decomposition: StageView,
    trained: StageView | None,
    layers: LayerRunner | None,
    workspace: Workspace,
    run: Run,
) -> tuple[Allocation, Verdict | None, LatencyResults | None]:
    """Allocate by the method under a budget of time if there are ``layers`` to be timed, else of parameters."""
    assert config.keep is not None
    modules = load_modules(decomposition, config.layout)
    specs = [module.spec for module in modules]
    times = None if layers is None else measured_times(config, specs, layers, workspace, run)
    budget = budget_of(config, specs, config.keep, times)
    kind: type[Allocator] = ALLOCATORS.load(config.method)
    allocator = kind(method_options(kind.Options, config.options))
    context = None
    if allocator.needs_model:
        context = with_training(open_tuning_context(decomposition, specs, config, workspace, run), trained)
    allocation, verdict = _guarded(config, allocator, modules, budget, context, run)
    latency = None if layers is None else latency_results(config, specs, allocation, budget, layers.runtime)
    return allocation, verdict, latency


def _guarded(
    config: AllocateConfig,
    allocator: Allocator,
    modules: list[Module],
    budget: Budget,
    context: TuningContext | None,
    run: Run,
) -> tuple[Allocation, Verdict | None]:
    """Allocate; the guard chooses between the result and simpler ones."""
    allocation = allocator.allocate(modules, budget, context)
    assert allocation.cost <= budget.limit, f"{config.method} exceeds the budget"
    if context is None or not config.guard:
        return allocation, None
    candidates = {config.method: allocation, **allocator.starts(modules, budget, context)}
    candidates.setdefault("uniform", Uniform().allocate(modules, budget))
    verdict = compare_candidates(candidates, context)
    shown = ", ".join(f"{name} {verdict.held_out[name]:.4f}" for name in ("dense", *candidates))
    run.report.fact(f"held-out negative log-likelihood, nats per token: {shown}")
    if verdict.winner != config.method:
        run.report.warn(
            f"{verdict.winner} is better than {config.method} on held-out text and is used instead (off: --no-guard)"
        )
    return candidates[verdict.winner], verdict
