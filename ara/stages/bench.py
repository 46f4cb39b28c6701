"""``ara bench``: how fast the chosen checkpoint is beside the dense model, and how much memory and disk it needs."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ara.config import BenchConfig
from ara.environment import machine
from ara.errors import UnavailableError, UsageError
from ara.evaluation.cost import Case, Cost
from ara.evaluation.footprint import peak_memory
from ara.evaluation.speed import interleaved_seconds, summarise
from ara.jsonfile import dump
from ara.models.placement import choose_placement
from ara.models.sources import ModelSource
from ara.stages.bench_models import DENSE, BenchModel, BenchModels, FindExport, in_other, in_torch
from ara.stages.common import (
    Run,
    already_done,
    begin,
    check_window,
    groups_in_memory,
    model_of,
)
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_name, parent_of

RESULTS_FILE = "results.json"
# Folder for what is exported for the time of the measurement.
_ASIDE = "aside"


def bench(
    config: BenchConfig,
    run: Run,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    find_export: FindExport | None = None,
) -> StageView:
    """Measure speed, memory and size of the dense model and the checkpoint, and store them with what was predicted.

    Args:
        config: cases, rounds, threads, device.
        run: workspace and reporter.
        checkpoint: which result of ``ara truncate``; the latest by default.
        name: of the result; says checkpoint, or export, and backend by default.
        find_export: needed for ``config.backend`` other than torch.

    Raises:
        AraError: a stage is missing or stale, a length is beyond the model, a device is not there.
    """
    started = begin(checkpoint, name)
    cases = _cases(config)
    resolved = _resolved(config, run)
    workspace = run.open()
    with workspace.lock(run.command):
        truncated = workspace.require("truncate", checkpoint)
        assert truncated.manifest is not None and resolved.threads is not None
        run.report.step(f"Measuring {truncated.key} against the dense model")
        decomposition = _decomposition_of(workspace, truncated)
        source = model_of(decomposition, run)
        _check_lengths(config, source)
        exported, parents = None, [truncated, decomposition]
        if config.backend != "torch":
            assert find_export is not None
            exported = find_export(workspace, truncated)
            parents.append(exported.view)
        facts = {
            "config": resolved,
            "model": truncated.manifest.model,
            "parents": tuple(parent_of(view) for view in parents),
        }
        name = name or f"{truncated.name if exported is None else exported.view.name}-{config.backend}"
        done = workspace.finished("bench", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        with workspace.writer("bench", name, facts, command=run.command, started=started) as stage:
            if exported is None:
                compared = in_torch(truncated, decomposition, source, resolved)
            else:
                compared = in_other(truncated, source, exported, stage.folder / _ASIDE, resolved.threads, run)
            stage.results.update(_measure(compared, cases, resolved, run))
            shutil.rmtree(stage.folder / _ASIDE, ignore_errors=True)
            text = dump(stage.results, RESULTS_FILE, indent=1)
            (stage.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
        return workspace.view(f"bench/{name}")


def _cases(config: BenchConfig) -> list[Case]:
    cases = [Case(batch, 0, tokens) for tokens in config.prefill for batch in config.batch]
    cases += [Case(batch, tokens, 1) for tokens in config.decode for batch in config.batch]
    if not cases:
        raise UsageError("--prefill and --decode are both empty: there is nothing to measure", "give one: --decode 512")
    return cases


def _resolved(config: BenchConfig, run: Run) -> BenchConfig:
    """Return the config with device, precision and threads decided; an export has decided the first two itself.

    Raises:
        UsageError: an unknown or missing device, one beside an export, or more threads than processors.
    """
    processors = os.cpu_count() or 1
    if config.threads is not None and config.threads > processors:
        raise UsageError(
            f"--threads {config.threads} is more than the {processors} processors of this machine",
            f"use at most {processors}",
        )
    threads = {"threads": config.threads or torch.get_num_threads()}
    placement = choose_placement(config.device, config.dtype)
    if config.backend == "torch":
        run.report.fact(placement.why)
        return config.model_copy(update={"device": placement.device, "dtype": placement.dtype, **threads})
    given = [f"--{name} {getattr(config, name)}" for name in ("device", "dtype") if getattr(config, name) != "auto"]
    if given:
        raise UsageError(
            f"{' and '.join(given)} is given, and --backend is {config.backend}: the export decides that",
            "leave it out, or export with --execution-provider and --precision",
        )
    return config.model_copy(update=threads)


def _check_lengths(config: BenchConfig, source: ModelSource) -> None:
    """Refuse lengths that the model has no positions for; the decoded token needs one, too."""
    limit = check_window(max(config.prefill, default=0), source.config, "--prefill")
    longest = max(config.decode, default=0)
    if limit is not None and longest >= limit:
        raise UsageError(
            f"--decode {longest} leaves no room for one more token in the {limit} positions of the model",
            f"use at most {limit - 1}",
        )


def _decomposition_of(workspace: Workspace, truncated: StageView) -> StageView:
    """Return the decomposition of a checkpoint, for the model that it names; its factors are not read."""
    return workspace.require("decompose", parent_name(truncated, "decompose"), verify=False)


def largest(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that need most memory: most positions, b · (p + s), and most tokens at once, b · s.

    The first has the largest caches; the second counts where a past is made up and not read, as in ONNX Runtime.
    """
    positions = max(cases, key=lambda case: (case.batch * (case.past + case.new), case.tokens))
    tokens = max(cases, key=lambda case: (case.tokens, case.batch * case.past))
    return list(dict.fromkeys((tokens, positions)))


def _measure(compared: BenchModels, cases: list[Case], config: BenchConfig, run: Run) -> dict[str, Any]:
    """Return all results."""
    variants = compared.models
    assert config.threads is not None
    # Before any model is in the memory of this process.
    peaks = _peaks(variants, largest(cases), run)
    groups = groups_in_memory(variants, compared.each_bytes, compared.device, run.report)
    models: dict[str, dict[str, Any]] = {}
    costs: dict[str, Cost] = {}
    seconds: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    passes = len(variants) * len(cases) * (config.rounds + 1)
    with _torch_threads(config.threads), run.report.bar("Measuring", passes) as bar:
        for group in groups:
            run.report.fact(f"loading {', '.join(model.name for model in group)}")
            runners = {model.name: model.load() for model in group}
            for model in group:
                runner = runners[model.name]
                costs[model.name] = runner.cost
                models[model.name] = {
                    "parameters": runner.parameters,
                    "weight_bytes": runner.weight_bytes,
                    "disk_bytes": model.disk_bytes,
                    "peak_memory_bytes": peaks[model.name],
                }
            for case in cases:
                seconds[case] |= interleaved_seconds(runners, case, config.rounds, advance=bar.advance)
            del runner, runners
            gc.collect()
    return {
        "chosen": variants[-1].name,
        "backend": config.backend,
        "device": compared.device,
        "machine": machine(),
        "precision": compared.precision,
        "threads": config.threads,
        "interleaved": len(groups) == 1,
        "models": models,
        "last_logits": costs[DENSE].last_logits,
        "cases": [summarise(case, seconds[case], costs, in_turn=len(groups) == 1) for case in cases],
    }


def _peaks(models: Sequence[BenchModel], cases: Sequence[Case], run: Run) -> dict[str, int | None]:
    """Return the peak memory of every model in a process of its own; ``None`` where it cannot be had."""
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


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads of the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
