"""From the typed results of manifests to the parts of the report.

Every function raises CorruptedError for a result of another form; the caller leaves it out and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ara.artifacts.benchmark import BenchmarkResults, Percentiles, RatioFigures
from ara.artifacts.checkpoint import CheckpointResults
from ara.artifacts.comparison import ComparisonResults, ComparisonSettings
from ara.artifacts.evaluation import (
    DENSE,
    UNIFORM,
    EvaluationResults,
    EvaluationSettings,
    MeanResults,
    PairedDifference,
    SpreadFigures,
    TaskResults,
    TextFigures,
    TextResults,
)
from ara.artifacts.factors import FactorsResults, FactorsSettings
from ara.artifacts.graph import GraphResults
from ara.artifacts.ranks import GuardResults, RanksResults, RanksSettings
from ara.artifacts.training import TrainingResults, TrainingSettings
from ara.data.texts import FILE_PREFIX
from ara.reporting.document import (
    Allocated,
    AllocatorRow,
    Base,
    BenchCase,
    Benched,
    BenchModel,
    BenchRow,
    Compared,
    Continuation,
    Curve,
    Decomposed,
    Difference,
    Evaluated,
    Exported,
    Guard,
    HarnessResult,
    HarnessRow,
    Kind,
    ModelSize,
    ParityRow,
    Spread,
    Step,
    Stored,
    TextResult,
    TextRow,
    Trained,
    Work,
    ZeroShot,
)
from ara.reporting.sharing import display_name, shared_origin, shared_text
from ara.workspace.manifest import Manifest


def read_base(model: Mapping[str, Any]) -> Base:
    """Return the dense model of a manifest."""
    return Base(
        name=display_name(dict(model)),
        requested=model["requested"],
        kind=model["kind"],
        architecture=model.get("architecture"),
        revision=model.get("revision"),
        fingerprint=model["fingerprint"],
    )


def read_decomposition(manifest: Manifest) -> Decomposed:
    """Return what the report says of the factors."""
    settings, results = FactorsSettings.read(manifest), FactorsResults.read(manifest)
    return Decomposed(
        name=manifest.name,
        method=settings.method,
        text=shared_text(settings.text),
        origin=shared_origin(results.text) if results.text else None,
        windows=(results.windows[0], results.windows[1]) if results.windows else None,
        dtype=settings.dtype,
        seed=manifest.seed,
    )


def read_allocation(manifest: Manifest) -> Allocated:
    """Return what the report says of the ranks."""
    settings, results = RanksSettings.read(manifest), RanksResults.read(manifest)
    return Allocated(
        name=manifest.name,
        method="from a file" if settings.ranks_sha256 else settings.method,
        keep=settings.keep,
        layout=settings.layout,
        linear_parameters_dense=results.linear_parameters_dense,
        linear_parameters=results.linear_parameters,
        linear_keep=results.linear_keep,
        model_parameters_dense=results.model_parameters_dense,
        model_parameters=results.model_parameters,
        model_keep=results.model_keep,
        kinds=tuple(Kind(kind=kind, **row.plain()) for kind, row in results.kinds.items()),
        guard=_guard(results.guard) if results.guard else None,
    )


def _guard(guard: GuardResults) -> Guard:
    losses, best = guard.held_out, guard.held_out[guard.winner]
    behind = {
        name: None if loss is None or best is None else loss - best for name, loss in losses.items() if name != DENSE
    }
    return Guard(winner=guard.winner, held_out=losses, behind=behind, stderr=guard.stderr)


def read_stored(name: str, results: CheckpointResults, dtype: str) -> Stored:
    """Return what the report says of the checkpoint."""
    return Stored(
        name=name,
        dtype=dtype,
        densified=results.densified,
        low_rank_layers=results.low_rank_layers,
        dense_layers=results.dense_layers,
        dense_weight_bytes=results.dense_weight_bytes,
        disk_bytes=results.disk_bytes,
        disk_keep=results.disk_bytes / results.dense_weight_bytes,
    )


def read_work(manifest: Manifest) -> Work:
    """Return what the report says of the making of one result."""
    config = manifest.config
    return Work(
        key=f"{manifest.stage}/{manifest.name}",
        device=config.get("device"),
        dtype=config.get("dtype"),
        **manifest.model_dump(include={"id", "created", "command", "seconds", "peak_memory_bytes"}),
    )


def read_training(manifest: Manifest) -> Trained:
    """Return the curves of a training."""
    settings, results = TrainingSettings.read(manifest), TrainingResults.read(manifest)
    curves = tuple(
        Curve(
            keep=float(keep),
            steps=row.steps,
            best_step=row.best_step,
            start_held_out=row.start_held_out,
            held_out=row.held_out,
            won=row.won,
            seconds=row.seconds,
            backward_passes=row.backward_passes,
            log=tuple(
                Step(step=step.step, keep=step.keep, loss=step.loss, held_out=step.held_out)
                for step in results.log.get(keep, ())
            ),
        )
        for keep, row in results.budgets.items()
    )
    return Trained(name=manifest.name, objective=settings.objective, loss=settings.loss, curves=curves)


def read_evaluation(manifest: Manifest) -> Evaluated:
    """Return an evaluation: perplexities, zero-shot tasks and continuations, as far as it has them."""
    settings, results = EvaluationSettings.read(manifest), EvaluationResults.read(manifest)
    names = text_labels(list(results.tasks))
    checksums = settings.text_sha256 or {}
    mean = results.zero_shot
    return Evaluated(
        name=manifest.name,
        chosen=results.chosen,
        device=settings.device,
        dtype=settings.dtype,
        interleaved=results.interleaved,
        models=tuple(ModelSize(name=name, **asdict(row)) for name, row in results.variants.items()),
        texts=tuple(_text(names[task], row, checksums.get(task), results) for task, row in results.texts.items()),
        harness=tuple(_harness(names[task], row, checksums.get(task)) for task, row in results.harness.items()),
        zero_shot=_zero_shot(mean) if mean else None,
        continuations=tuple(Continuation(prompt=row.prompt, models=row.models) for row in results.continuations),
    )


def text_labels(tasks: Sequence[str]) -> dict[str, str]:
    """Return what tasks are called in a shared file; files of one name in several folders are numbered."""
    names = {"wikitext2": "WikiText-2", "c4": "C4"}
    labels: dict[str, str] = {}
    for task in tasks:
        label = names.get(task, shared_text(task) if task.startswith(FILE_PREFIX) else task)
        same = sum(known == label or known.startswith(f"{label} (") for known in labels.values())
        labels[task] = f"{label} ({same + 1})" if same else label
    return labels


def _text(label: str, row: TextResults, sha256: str | None, results: EvaluationResults) -> TextResult:
    models, chosen = row.models, results.chosen
    # Speeds of models that were not run in turn are those of different spells of the machine.
    dense = _spread(models[DENSE].tokens_per_second) if results.interleaved else None
    return TextResult(
        task=label,
        origin=shared_origin(row.text) if row.text else None,
        sha256=sha256,
        windows=row.windows,
        seq_len=row.seq_len,
        models={name: _text_row(figures, None if name == DENSE else dense) for name, figures in models.items()},
        over_uniform=_paired(models[chosen], models[UNIFORM]) if UNIFORM in models and chosen in models else None,
    )


def _text_row(figures: TextFigures, dense: Spread | None) -> TextRow:
    divergence, speed = figures.divergence, _spread(figures.tokens_per_second)
    ratio = None
    if dense is not None:
        ratio = Spread(median=speed.median / dense.median, low=speed.low / dense.high, high=speed.high / dense.low)
    return TextRow(
        nll=figures.nll,
        stderr=figures.nll_stderr,
        perplexity=figures.perplexity,
        speed=speed,
        ratio=ratio,
        kl=divergence.kl if divergence else None,
        kl_stderr=divergence.kl_stderr if divergence else None,
        agreement=divergence.agreement if divergence else None,
    )


def _paired(one: TextFigures, other: TextFigures) -> Difference | None:
    """Return the mean difference of two models' NLLs over the windows that both have read, and its standard error."""
    first, second = one.window_nlls, other.window_nlls
    if not first or len(first) != len(second):
        return None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(difference=statistics.fmean(differences), stderr=stderr)


def _harness(label: str, row: TaskResults, sha256: str | None) -> HarnessResult:
    return HarnessResult(
        task=label,
        metric=row.metric,
        sha256=sha256,
        examples=row.examples,
        of=row.of,
        seed=row.seed,
        models={
            name: HarnessRow(value=figures.value, stderr=figures.stderr, retained=figures.retained)
            for name, figures in row.models.items()
        },
        compared=_differences(row.compared),
    )


def _differences(compared: Mapping[str, PairedDifference]) -> dict[str, Difference]:
    return {name: Difference(**asdict(found)) for name, found in compared.items()}


def _zero_shot(mean: MeanResults) -> ZeroShot:
    return ZeroShot(
        tasks=mean.tasks,
        models={
            name: HarnessRow(value=figures.mean, stderr=figures.stderr, retained=figures.retained)
            for name, figures in mean.models.items()
        },
        compared=_differences(mean.compared),
    )


def read_bench(manifest: Manifest) -> Benched:
    """Return a benchmark."""
    results = BenchmarkResults.read(manifest)
    return Benched(
        name=manifest.name,
        chosen=results.chosen,
        backend=results.backend,
        device=results.device,
        precision=results.precision,
        threads=results.threads,
        machine=results.machine,
        interleaved=results.interleaved,
        models={name: BenchModel(**asdict(row)) for name, row in results.models.items()},
        cases=tuple(
            BenchCase(
                kind=case.kind,
                batch=case.batch,
                past=case.past,
                new=case.new,
                models={
                    name: BenchRow(
                        seconds=_of_rounds(row.seconds),
                        tokens_per_second=_of_rounds(row.tokens_per_second),
                        # Rounds of different times make no ratio.
                        ratio=_spread(row.ratio) if row.ratio and results.interleaved else None,
                        predicted=row.predicted,
                        macs=row.macs,
                        bytes_read=row.bytes_read,
                    )
                    for name, row in case.models.items()
                },
            )
            for case in results.cases
        ),
    )


def read_comparison(manifest: Manifest) -> Compared:
    """Return a comparison of allocators."""
    settings, results = ComparisonSettings.read(manifest), ComparisonResults.read(manifest)
    names = text_labels(list(results.methods[DENSE].tasks or {}))
    return Compared(
        name=manifest.name,
        keep=settings.keep,
        layout=settings.layout,
        tasks=tuple(names.values()),
        methods={
            method: AllocatorRow(
                held_out=row.held_out,
                perplexity={names[task]: found.perplexity for task, found in (row.tasks or {}).items()},
                gap_closed={names[task]: found.gap_closed for task, found in (row.tasks or {}).items()},
                dense_layers=row.dense_layers,
                seconds=row.seconds,
                backward_passes=row.backward_passes,
                error=row.error,
            )
            for method, row in results.methods.items()
        },
    )


def read_export(manifest: Manifest) -> Exported:
    """Return an export and its comparison with torch."""
    results = GraphResults.read(manifest)
    return Exported(
        name=manifest.name,
        precision=results.precision,
        provider=results.execution_provider,
        graph_bytes=sum(file.bytes for file in results.files.values()) if results.files else None,
        parity=tuple(ParityRow(**asdict(case)) for case in results.parity.cases) if results.parity else (),
    )


def _spread(found: SpreadFigures | RatioFigures) -> Spread:
    return Spread(median=found.median, low=found.low, high=found.high)


def _of_rounds(found: Percentiles) -> Spread:
    return Spread(median=found.median, low=found.p10, high=found.p90)
