"""From the typed results of manifests to the parts of the report.

Every function raises CorruptedError for a result of another form; the caller leaves it out and reports that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ara.artifacts.benchmark import BenchmarkResults, CaseResults, Percentiles, ServingCase
from ara.artifacts.checkpoint import CheckpointResults
from ara.artifacts.comparison import (
    ComparedMethod,
    ComparisonResults,
    ComparisonSettings,
    SizedModel,
    best_in_words,
)
from ara.artifacts.evaluation import (
    DENSE,
    UNIFORM,
    ChatFigures,
    ChatResults,
    EvaluationResults,
    EvaluationSettings,
    MeanResults,
    SpreadFigures,
    TextFigures,
    TextResults,
)
from ara.artifacts.factors import FactorsResults, FactorsSettings, TextPart
from ara.artifacts.graph import GraphResults
from ara.artifacts.ranks import GuardResults, RanksResults, RanksSettings
from ara.artifacts.training import TrainingResults, TrainingSettings
from ara.data.filespecs import is_file
from ara.data.mixtures import Share, mixture_spec, origin_in_words
from ara.reporting import (
    benchmark_parts,
    checkpoint_parts,
    comparison_parts,
    evaluation_parts,
    export_parts,
    training_parts,
)
from ara.reporting.sharing import display_name, shared_origin, shared_text
from ara.workspace.manifest import Manifest


def read_base(model: Mapping[str, Any]) -> checkpoint_parts.Base:
    """Return the dense model of a manifest."""
    return checkpoint_parts.Base(
        name=display_name(dict(model)),
        requested=model["requested"],
        kind=model["kind"],
        architecture=model.get("architecture"),
        revision=model.get("revision"),
        fingerprint=model["fingerprint"],
    )


def read_decomposition(manifest: Manifest) -> checkpoint_parts.Decomposed:
    """Return the factors."""
    settings, results = FactorsSettings.read(manifest), FactorsResults.read(manifest)
    return checkpoint_parts.Decomposed.from_source(
        settings,
        name=manifest.name,
        text=_calibration_text(settings, results),
        origin=_calibration_origin(results),
        windows=results.windows or None,
        seed=manifest.seed,
    )


def _shared_part(part: TextPart) -> TextPart:
    """Return a text without local folders."""
    return replace(part, name=shared_text(part.name), origin=shared_origin(part.origin))


def _calibration_text(settings: FactorsSettings, results: FactorsResults) -> str | None:
    """Return names and shares of the calibration text, without local folders."""
    if not results.parts:  # an older result, or a method without calibration
        return None if settings.text is None else shared_text(settings.text)
    return mixture_spec([Share(part.name, part.share) for part in map(_shared_part, results.parts)])


def _calibration_origin(results: FactorsResults) -> str | None:
    """Return where the calibration text came from, in words, without local folders."""
    if not results.parts:
        return shared_origin(results.text) if results.text else None
    return origin_in_words([(part.share, part.origin) for part in map(_shared_part, results.parts)])


def read_allocation(manifest: Manifest) -> checkpoint_parts.Allocated:
    """Return the ranks."""
    settings, results = RanksSettings.read(manifest), RanksResults.read(manifest)
    return checkpoint_parts.Allocated.from_source(
        results,
        name=manifest.name,
        method="from a file" if settings.ranks_sha256 else settings.method,
        # A share of time is none of parameters, which all others are.
        keep=settings.keep if settings.objective == "parameters" else None,
        layout=settings.layout,
        kinds=[checkpoint_parts.Kind.from_source(row, kind=kind) for kind, row in results.kinds.items()],
        guard=_guard(results.guard) if results.guard else None,
        latency=checkpoint_parts.Latency.from_source(results.latency) if results.latency else None,
    )


def _guard(guard: GuardResults) -> checkpoint_parts.Guard:
    losses, best = guard.held_out, guard.held_out[guard.winner]
    behind = {
        name: None if loss is None or best is None else loss - best for name, loss in losses.items() if name != DENSE
    }
    return checkpoint_parts.Guard.from_source(guard, behind=behind)


def read_stored(name: str, results: CheckpointResults, dtype: str) -> checkpoint_parts.Stored:
    """Return the checkpoint."""
    disk_keep = results.disk_bytes / results.dense_weight_bytes
    repairs = {
        field: found and replace(found, parts=tuple(map(_shared_part, found.parts)))
        for field in ("recovery", "recovery_after_rounding")
        for found in [getattr(results, field)]
    }
    return checkpoint_parts.Stored.from_source(results, name=name, dtype=dtype, disk_keep=disk_keep, **repairs)


def read_work(manifest: Manifest) -> checkpoint_parts.Work:
    """Return how one result was made."""
    config = manifest.config
    return checkpoint_parts.Work.from_source(manifest, device=config.get("device"), dtype=config.get("dtype"))


def read_training(manifest: Manifest) -> training_parts.Trained:
    """Return the curves of a training."""
    results = TrainingResults.read(manifest)
    curves = [
        training_parts.Curve.from_source(row, keep=float(keep), log=results.log.get(keep, ()))
        for keep, row in results.budgets.items()
    ]
    return training_parts.Trained.from_source(TrainingSettings.read(manifest), name=manifest.name, curves=curves)


def read_evaluation(manifest: Manifest) -> evaluation_parts.Evaluated:
    """Return an evaluation: its perplexities, conversations, zero-shot tasks and continuations."""
    settings, results = EvaluationSettings.read(manifest), EvaluationResults.read(manifest)
    names = text_labels(list(results.tasks))
    checksums = settings.text_sha256 or {}
    return evaluation_parts.Evaluated.from_source(
        results,
        name=manifest.name,
        device=settings.device,
        dtype=settings.dtype,
        models=[evaluation_parts.ModelSize.from_source(row, name=name) for name, row in results.variants.items()],
        texts=[_text(names[task], row, checksums.get(task), results) for task, row in results.texts.items()],
        harness=[
            evaluation_parts.HarnessResult.from_source(row, task=names[task], sha256=checksums.get(task))
            for task, row in results.harness.items()
        ],
        zero_shot=_zero_shot(results.zero_shot) if results.zero_shot else None,
        chats=[_chat(names[task], row, checksums.get(task)) for task, row in results.chats.items()],
    )


def text_labels(tasks: Sequence[str]) -> dict[str, str]:
    """Return the names of tasks in a shared file; files of one name in several folders are numbered."""
    names = {"wikitext2": "WikiText-2", "c4": "C4"}
    labels: dict[str, str] = {}
    for task in tasks:
        label = names.get(task, shared_text(task) if is_file(task) else task)
        same = sum(known == label or known.startswith(f"{label} (") for known in labels.values())
        labels[task] = f"{label} ({same + 1})" if same else label
    return labels


def _text(label: str, row: TextResults, sha256: str | None, results: EvaluationResults) -> evaluation_parts.TextResult:
    models, chosen = row.models, results.chosen
    # The load of the machine may change between models that did not take turns: their speeds make no ratio.
    dense = models[DENSE].tokens_per_second if results.interleaved else None
    return evaluation_parts.TextResult.from_source(
        row,
        task=label,
        origin=shared_origin(row.text) if row.text else None,
        sha256=sha256,
        models={name: _text_row(figures, None if name == DENSE else dense) for name, figures in models.items()},
        over_uniform=_paired(models[chosen], models[UNIFORM]) if UNIFORM in models and chosen in models else None,
    )


def _chat(label: str, row: ChatResults, sha256: str | None) -> evaluation_parts.ChatResult:
    return evaluation_parts.ChatResult.from_source(
        row,
        task=label,
        origin=shared_origin(row.text),
        sha256=sha256,
        models={name: _chat_row(figures) for name, figures in row.models.items()},
    )


def _chat_row(figures: ChatFigures) -> evaluation_parts.ChatRow:
    found = figures.divergence
    return evaluation_parts.ChatRow(
        kl=found.kl if found else None,
        kl_stderr=found.kl_stderr if found else None,
        agreement=found.agreement if found else None,
        empty=figures.empty,
    )


def _text_row(figures: TextFigures, dense: SpreadFigures | None) -> evaluation_parts.TextRow:
    divergence, speed = figures.divergence, figures.tokens_per_second
    ratio = None
    if dense is not None:
        ratio = SpreadFigures(speed.median / dense.median, speed.low / dense.high, speed.high / dense.low)
    return evaluation_parts.TextRow.from_source(
        figures,
        stderr=figures.nll_stderr,
        speed=speed,
        ratio=ratio,
        kl=divergence.kl if divergence else None,
        kl_stderr=divergence.kl_stderr if divergence else None,
        agreement=divergence.agreement if divergence else None,
    )


def _paired(one: TextFigures, other: TextFigures) -> evaluation_parts.Difference | None:
    """Return the mean difference of two models' NLLs over the windows that both have read, and its standard error."""
    first, second = one.window_nlls, other.window_nlls
    if not first or len(first) != len(second):
        return None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return evaluation_parts.Difference(difference=statistics.fmean(differences), stderr=stderr)


def _zero_shot(mean: MeanResults) -> evaluation_parts.ZeroShot:
    models = {
        name: evaluation_parts.HarnessRow.from_source(figures, value=figures.mean)
        for name, figures in mean.models.items()
    }
    return evaluation_parts.ZeroShot.from_source(mean, models=models)


def read_bench(manifest: Manifest) -> benchmark_parts.Benched:
    """Return a benchmark."""
    results = BenchmarkResults.read(manifest)
    cases = [_case(case, results.interleaved) for case in results.cases]
    serving = [_serving(case, results.interleaved) for case in results.serving or ()]
    return benchmark_parts.Benched.from_source(results, name=manifest.name, cases=cases, serving=serving)


def _case(case: CaseResults, interleaved: bool) -> benchmark_parts.BenchCase:
    models = {
        name: benchmark_parts.BenchRow.from_source(
            row,
            seconds=_spread(row.seconds),
            tokens_per_second=_spread(row.tokens_per_second),
            ratio=row.ratio if interleaved else None,  # rounds of different times make no ratio
        )
        for name, row in case.models.items()
    }
    return benchmark_parts.BenchCase.from_source(case, models=models)


def _serving(case: ServingCase, interleaved: bool) -> benchmark_parts.ServingRequests:
    models = {
        name: benchmark_parts.ServingRow(
            output_tokens_per_second=_spread(row.output_tokens_per_second),
            first_token_seconds=_spread(row.first_token_seconds),
            ratio=row.ratio if interleaved else None,
        )
        for name, row in case.models.items()
    }
    return benchmark_parts.ServingRequests.from_source(case, models=models)


def _spread(rounds: Percentiles) -> SpreadFigures:
    return SpreadFigures(rounds.median, rounds.p10, rounds.p90)


def read_comparison(manifest: Manifest) -> comparison_parts.Compared:
    """Return a comparison of allocators."""
    results = ComparisonResults.read(manifest)
    names = text_labels(list(results.methods[DENSE].tasks or {}))
    return comparison_parts.Compared.from_source(
        ComparisonSettings.read(manifest),
        name=manifest.name,
        tasks=list(names.values()),
        methods={method: _allocator(row, names) for method, row in results.methods.items()},
    )


def read_size_front(manifest: Manifest) -> comparison_parts.SizeFront:
    """Return a comparison of forms of the model at some sizes."""
    models = (ComparisonResults.read(manifest).models or {}).values()
    points = [_sized_point(model) for model in models]
    if all(point.perplexity is None for point in points):
        raise ValueError("no model was measured")
    return comparison_parts.SizeFront.from_source(
        ComparisonSettings.read(manifest), name=manifest.name, verdict=best_in_words(models), points=points
    )


def _sized_point(model: SizedModel) -> comparison_parts.SizedPoint:
    measured = model.held_out is not None and model.bytes is not None
    perplexity = math.exp(model.held_out) if measured and model.held_out is not None else None
    return comparison_parts.SizedPoint.from_source(model, perplexity=perplexity)


def _allocator(row: ComparedMethod, names: Mapping[str, str]) -> comparison_parts.AllocatorRow:
    tasks = {names[task]: found for task, found in (row.tasks or {}).items()}
    return comparison_parts.AllocatorRow.from_source(
        row,
        perplexity={name: found.perplexity for name, found in tasks.items()},
        gap_closed={name: found.gap_closed for name, found in tasks.items()},
    )


def read_export(manifest: Manifest) -> export_parts.Exported:
    """Return an export and its comparison with torch."""
    results = GraphResults.read(manifest)
    return export_parts.Exported.from_source(
        results,
        name=manifest.name,
        provider=results.execution_provider,
        graph_bytes=sum(file.bytes for file in results.files.values()) if results.files else None,
        exact=len(results.fallback.matrices) if results.fallback else 0,
        candidates=results.fallback.candidates if results.fallback else 0,
        parity=results.parity.cases if results.parity else (),
    )
