"""``ara bench``: speed, memory and size of the chosen checkpoint and of the dense model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from ara.artifacts.benchmark import BenchmarkResults, CaseFigures, CaseResults, ModelCost, Percentiles, RatioFigures
from ara.artifacts.evaluation import DENSE
from ara.config import BenchConfig
from ara.environment import machine
from ara.errors import UnavailableError, UsageError
from ara.evaluation.cost import Case, Cost
from ara.evaluation.footprint import peak_memory
from ara.evaluation.speed import interleaved_seconds, ratio
from ara.evaluation.timing import spread, torch_threads
from ara.models.context import check_window
from ara.models.placement import choose_placement
from ara.models.sources import ModelSource
from ara.stages.bench_models import BenchModel, BenchModels, FindExport, in_other, in_torch
from ara.stages.common import Run, begin, check_threads, groups_in_memory, model_of, open_task
from ara.workspace.view import StageView

# Fields of the config that belong to :mod:`ara.stages.bench_serving`.
SERVING_FIELDS = ("concurrency", "prompt_tokens", "new_tokens")
# Folder for temporary exports.
_ASIDE = "aside"


def bench(
    config: BenchConfig,
    run: Run,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    find_export: FindExport | None = None,
) -> StageView:
    """Measure speed, memory and size of the dense model and the checkpoint; store them with predicted ratios.

    Args:
        config: cases, rounds, threads, device.
        run: workspace and reporter.
        checkpoint: NAME or STAGE/NAME; the latest by default.
        name: of the result; by default checkpoint (or export) and backend.
        find_export: required if ``config.backend`` is not torch.

    Raises:
        AraError: a stage is missing or stale, a length exceeds the model's limit, a device does not exist.
    """
    started = begin(name, checkpoint)
    refuse_others(config, SERVING_FIELDS, "they describe requests to --backend vllm")
    cases = _cases(config)
    resolved = _resolved(config, run)
    with open_task("bench", run, started) as task:
        workspace = task.workspace
        truncated = workspace.require("checkpoint", checkpoint)
        assert resolved.threads is not None
        run.report.step(f"Measuring {truncated.key} against the dense model")
        # Only its model is needed: the factors are not read.
        decomposition = workspace.ancestor(truncated, "factors", verify=False)
        source = model_of(decomposition, run)
        _check_lengths(config, source)
        exported, parents = None, [truncated, decomposition]
        if config.backend != "torch":
            assert find_export is not None
            exported = find_export(workspace, truncated)
            parents.append(exported.view)
        measured = truncated.name if exported is None else exported.view.name
        settings = resolved.model_dump(mode="json", exclude=set(SERVING_FIELDS))
        task.describe(name or f"{measured}-{config.backend}", settings, parents)
        if (done := task.done()) is not None:
            return done
        with task.writer() as stage:
            if exported is None:
                compared = in_torch(truncated, decomposition, source, resolved)
            else:
                compared = in_other(truncated, source, exported, stage.folder / _ASIDE, resolved.threads, run)
            results = _measure(compared, cases, resolved, run)
            shutil.rmtree(stage.folder / _ASIDE, ignore_errors=True)
            results.write_file(stage)
        return task.view()


def refuse_others(config: BenchConfig, fields: Sequence[str], hint: str) -> None:
    """Refuse options that the backend has no use for.

    Args:
        config: as the user gave it.
        fields: those of other backends.
        hint: what they are for.

    Raises:
        UsageError: one of them differs from its default.
    """
    defaults = BenchConfig()
    given = [f"--{name.replace('_', '-')}" for name in fields if getattr(config, name) != getattr(defaults, name)]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be combined with --backend {config.backend}", hint)


def _cases(config: BenchConfig) -> list[Case]:
    cases = [Case(batch, 0, tokens) for tokens in config.prefill for batch in config.batch]
    cases += [Case(batch, tokens, 1) for tokens in config.decode for batch in config.batch]
    if not cases:
        raise UsageError("--prefill and --decode are both empty: there is nothing to measure", "give one: --decode 512")
    return cases


def _resolved(config: BenchConfig, run: Run) -> BenchConfig:
    """Return the config with device, dtype and threads resolved; an export has its own device and dtype.

    Raises:
        UsageError: an unknown or missing device, device or dtype with an export, or more threads than processors.
    """
    check_threads(config.threads)
    threads = {"threads": config.threads or torch.get_num_threads()}
    placement = choose_placement(config.device, config.dtype)
    if config.backend == "torch":
        run.check_offload(placement.device)
        run.report.fact(placement.why)
        return config.model_copy(update={"device": placement.device, "dtype": placement.dtype, **threads})
    given = [f"--{name} {getattr(config, name)}" for name in ("device", "dtype") if getattr(config, name) != "auto"]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be combined with --backend {config.backend}: the export decides that",
            "omit it, or export with --execution-provider and --precision",
        )
    return config.model_copy(update=threads)


def _check_lengths(config: BenchConfig, source: ModelSource) -> None:
    """Refuse lengths beyond the model's positions; the decoded token needs one position, too."""
    limit = check_window(max(config.prefill, default=0), source.config, "--prefill")
    longest = max(config.decode, default=0)
    if limit is not None and longest >= limit:
        raise UsageError(
            f"--decode {longest} leaves no room for one more token in the {limit} positions of the model",
            f"use at most {limit - 1}",
        )


def largest(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that need most memory: most positions, b · (p + s), and most tokens per pass, b · s.

    The first has the largest caches. The second can be larger where the past is not read but made up, as in ONNX
    Runtime.
    """
    positions = max(cases, key=lambda case: (case.batch * (case.past + case.new), case.tokens))
    tokens = max(cases, key=lambda case: (case.tokens, case.batch * case.past))
    return list(dict.fromkeys((tokens, positions)))


def _measure(compared: BenchModels, cases: list[Case], config: BenchConfig, run: Run) -> BenchmarkResults:
    variants = compared.models
    assert config.threads is not None
    # First, while no model is in the memory of this process.
    peaks = _peaks(variants, largest(cases), run)
    groups = groups_in_memory(variants, compared.each_bytes, compared.device, run.report)
    models: dict[str, ModelCost] = {}
    costs: dict[str, Cost] = {}
    seconds: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    passes = len(variants) * len(cases) * (config.rounds + 1)
    with torch_threads(config.threads), run.report.bar("Measuring", passes) as bar:
        for group in groups:
            run.report.fact(f"loading {', '.join(model.name for model in group)}")
            runners = {model.name: model.load() for model in group}
            for model in group:
                runner = runners[model.name]
                costs[model.name] = runner.cost
                models[model.name] = ModelCost(
                    runner.parameters, runner.weight_bytes, model.disk_bytes, peaks[model.name]
                )
            for case in cases:
                seconds[case] |= interleaved_seconds(runners, case, config.rounds, advance=bar.advance)
            del runner, runners
            gc.collect()
    return BenchmarkResults(
        chosen=variants[-1].name,
        backend=config.backend,
        device=compared.device,
        machine=machine(),
        precision=compared.precision,
        threads=config.threads,
        interleaved=len(groups) == 1,
        models=models,
        last_logits=costs[DENSE].last_logits,
        cases=tuple(case_results(case, seconds[case], costs, in_turn=len(groups) == 1) for case in cases),
    )


def case_results(
    case: Case, seconds: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], *, in_turn: bool
) -> CaseResults:
    """Return a case's figures; all models are compared with the first.

    Args:
        case: what was measured.
        seconds: per model and round.
        costs: per model.
        in_turn: whether the models ran in the same rounds; else there is no ratio.
    """
    base = next(iter(seconds))
    rows = {
        name: CaseFigures(
            seconds=percentiles(values),
            tokens_per_second=percentiles([case.tokens / value for value in values]),
            ratio=RatioFigures(**asdict(ratio(seconds[base], values))) if in_turn else None,
            predicted=costs[name].predicted_ratio(costs[base], case),
            macs=costs[name].macs(case),
            bytes_read=costs[name].bytes_read(case),
        )
        for name, values in seconds.items()
    }
    return CaseResults(case.kind, case.batch, case.past, case.new, rows)


def percentiles(values: Sequence[float]) -> Percentiles:
    """Return median, 10th and 90th percentile of at least one value."""
    found = spread(values)
    return Percentiles(median=found.median, p10=found.low, p90=found.high)


def _peaks(models: Sequence[BenchModel], cases: Sequence[Case], run: Run) -> dict[str, int | None]:
    """Return the peak memory of every model, each in a separate process; ``None`` where it cannot be measured."""
    peaks: dict[str, int | None] = {}
    with run.report.bar("Measuring memory", len(models)) as bar:
        for model in models:
            peaks[model.name] = None
            try:
                if model.measurable:
                    peaks[model.name] = peak_memory(model.load, cases)
            except UnavailableError as error:
                run.report.warn(f"{model.name}: {error}")
            bar.advance()
    return peaks
