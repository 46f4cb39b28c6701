"""Checkpoints of the same factors side by side: perplexity against size, quality against speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ara.artifacts.checkpoint import RecoveryFigures
from ara.artifacts.evaluation import DENSE, UNIFORM, SpreadFigures
from ara.layout_names import DEFAULT_LAYOUT
from ara.reporting.benchmark_parts import BenchCase, Benched
from ara.reporting.checkpoint_parts import Allocated, Stored
from ara.reporting.evaluation_parts import Evaluated, TextResult
from ara.reporting.pareto_parts import Front, FrontPoint, SpeedFront, SpeedPoint
from ara.reporting.summary import (
    case_name,
    in_runtime,
    machine_words,
    main_case,
    main_zero_shot,
    runtime_key,
    tokens_of,
)

# A case of a benchmark.
_Timed = tuple[Benched, BenchCase]
# The dense model's speed relative to itself.
_SAME = SpreadFigures(median=1.0, low=1.0, high=1.0)


@dataclass(frozen=True)
class Measured:
    """One checkpoint with its measurements; ``current`` marks the checkpoint of the report."""

    allocation: Allocated
    checkpoint: Stored
    evaluations: tuple[Evaluated, ...]
    benches: tuple[Benched, ...]
    current: bool

    def series(self, method: str) -> str:
        """Return the series (line of a chart) of a model of this checkpoint."""
        words = [method]
        if self.allocation.layout != DEFAULT_LAYOUT:
            words.append(self.allocation.layout)
        if self.checkpoint.densified:
            words.append("densified")
        if method != UNIFORM:
            words += _last_level(self.checkpoint.recovery)
            words += [f"{level} after rounding" for level in _last_level(self.checkpoint.recovery_after_rounding)]
        return ", ".join(words)


def _last_level(recovery: RecoveryFigures | None) -> list[str]:
    """Return the last level of a recovery that was kept, if there is one."""
    return [] if recovery is None else [level.level for level in recovery.levels if level.in_weights][-1:]


def perplexity_fronts(measured: Sequence[Measured]) -> tuple[Front, ...]:
    """Return one front for every text of the current checkpoint; all its points were measured on the same windows.

    Of several evaluations of one text, the one shared by most checkpoints is taken, then the longest, then the latest.
    """
    (current,) = [item for item in measured if item.current]
    best: dict[tuple[str, str | None], Front] = {}
    for evaluation in current.evaluations:
        for result in evaluation.texts:
            front = _front(measured, evaluation, result)
            known = best.get((result.task, result.sha256))
            if known is None or _weight(front) >= _weight(known):
                best[result.task, result.sha256] = front
    return tuple(best.values())


def _front(measured: Sequence[Measured], evaluation: Evaluated, result: TextResult) -> Front:
    points: dict[tuple[str, float, str], FrontPoint] = {}
    for item in measured:
        for other, same in _same_text(item, evaluation, result):
            for point in _points(item, other, same):
                points[point.series, point.linear_keep, point.checkpoint] = point
    return Front(
        task=result.task,
        windows=result.windows,
        seq_len=result.seq_len,
        dtype=evaluation.dtype,
        dense=result.models[DENSE].perplexity,
        points=tuple(sorted(points.values(), key=lambda point: (point.series, point.linear_keep))),
    )


def _weight(front: Front) -> tuple[int, int]:
    return len(front.points), front.windows * front.seq_len


def _same_text(item: Measured, evaluation: Evaluated, result: TextResult) -> Iterator[tuple[Evaluated, TextResult]]:
    """Yield the evaluations on the same windows in the same precision."""
    for other in item.evaluations:
        for found in other.texts:
            if _windows(other, found) == _windows(evaluation, result):
                yield other, found


def _points(item: Measured, evaluation: Evaluated, result: TextResult) -> Iterator[FrontPoint]:
    for model in evaluation.models:
        if model.name not in (UNIFORM, evaluation.chosen) or model.name not in result.models:
            continue
        is_chosen = model.name == evaluation.chosen
        yield FrontPoint(
            checkpoint=item.checkpoint.name if is_chosen else model.name,
            series=item.series(item.allocation.method if is_chosen else UNIFORM),
            linear_keep=model.linear_keep,
            model_keep=model.model_keep,
            perplexity=result.models[model.name].perplexity,
            current=item.current and is_chosen,
        )


def speed_front(measured: Sequence[Measured]) -> SpeedFront | None:
    """Return accuracy, or else perplexity, against speed relative to dense; ``None`` if either was not measured.

    Of several evaluations and benchmarks, those shared by most checkpoints are taken.
    """
    (current,) = [item for item in measured if item.current]
    mean, texts = main_zero_shot(current.evaluations), _texts(current)
    timed = [(bench, main_case(bench)) for bench in current.benches]
    cases = [(bench, case) for bench, case in timed if case]
    qualities: list[_Quality] = [_accuracies(mean[0])] if mean else [_perplexities(*text) for text in texts]
    found = []
    for quality in qualities:
        same: list[_Timed | None] = [case for case in cases if _same_precision(case[0], quality)]
        found += [_speed_front(measured, quality, case) for case in same or [None]]
    drawn = [front for front in found if any(point.current for point in front.points)]
    return max(enumerate(drawn), key=lambda item: (len(item[1].points), item[0]))[1] if drawn else None


def _same_precision(bench: Benched, quality: _Quality) -> bool:
    """Tell whether speed and quality were measured in the same precision, as far as is known."""
    names = {"fp32": "float32", "fp16": "float16"}
    return quality.dtype is None or names.get(bench.precision, bench.precision) == quality.dtype


def _texts(current: Measured) -> list[tuple[Evaluated, TextResult]]:
    """Return all evaluated texts, the longest last."""
    texts = [(evaluation, result) for evaluation in current.evaluations for result in evaluation.texts]
    return sorted(texts, key=lambda item: tokens_of(item[1]))


def _speed_front(measured: Sequence[Measured], quality: _Quality, case: _Timed | None) -> SpeedFront:
    points: dict[tuple[str, str], SpeedPoint] = {}
    for item in measured:
        for evaluation in item.evaluations:
            for model in evaluation.models:
                value, ratio = quality.of(evaluation, model.name), _ratio(item, evaluation, model.name, case)
                if value is not None and ratio is not None:
                    point = _speed_point(item, evaluation, model.name, ratio, value)
                    points[point.series, "" if model.name == DENSE else item.checkpoint.name] = point
    ordered = sorted(points.values(), key=lambda point: (point.series != DENSE, point.series, point.checkpoint))
    return SpeedFront(
        measure=quality.measure,
        task=quality.task,
        speed="reading" if case is None else f"{case_name(case[1])}{in_runtime(case[0])}",
        points=tuple(ordered),
    )


def _speed_point(
    item: Measured, evaluation: Evaluated, model: str, ratio: SpreadFigures, quality: tuple[float, float | None]
) -> SpeedPoint:
    is_chosen = model == evaluation.chosen
    return SpeedPoint(
        checkpoint=item.checkpoint.name if is_chosen else model,
        series=DENSE if model == DENSE else item.series(item.allocation.method if is_chosen else model),
        ratio=ratio,
        quality=quality[0],
        stderr=quality[1],
        current=item.current and is_chosen,
    )


@dataclass(frozen=True)
class _Quality:
    """One measure of quality: ``of(evaluation, model)`` is a value with its standard error, or ``None``."""

    measure: Literal["accuracy", "perplexity"]
    task: str
    dtype: str | None
    of: Callable[[Evaluated, str], tuple[float, float | None] | None]


def _accuracies(wanted: Evaluated) -> _Quality:
    """Return the mean accuracy over the questions of ``wanted``."""

    def of(evaluation: Evaluated, model: str) -> tuple[float, float | None] | None:
        mean = evaluation.zero_shot
        if mean is None or _questions(evaluation) != _questions(wanted) or model not in mean.models:
            return None
        return mean.models[model].value, mean.models[model].stderr

    assert wanted.zero_shot is not None
    return _Quality("accuracy", f"mean of {len(wanted.zero_shot.tasks)} zero-shot tasks", wanted.dtype, of)


def _questions(evaluation: Evaluated) -> object:
    """Return what must be the same in two accuracies to compare them: tasks, questions, precision."""
    tasks = evaluation.zero_shot.tasks if evaluation.zero_shot else ()
    rows = [row for row in evaluation.harness if row.task in tasks]
    asked = {(row.task, row.metric, row.sha256, row.examples, row.seed) for row in rows}
    return tasks, asked, evaluation.dtype


def _perplexities(wanted: Evaluated, text: TextResult) -> _Quality:
    """Return the perplexity on the same windows of a text."""

    def of(evaluation: Evaluated, model: str) -> tuple[float, float | None] | None:
        for found in evaluation.texts:
            if _windows(evaluation, found) == _windows(wanted, text) and model in found.models:
                row = found.models[model]
                return row.perplexity, None if row.stderr is None else row.stderr * row.perplexity
        return None

    return _Quality("perplexity", text.task, wanted.dtype, of)


def _windows(evaluation: Evaluated, result: TextResult) -> tuple[object, ...]:
    """Return what must be the same in two perplexities to compare them: text, windows, precision."""
    return result.sha256 or result.task, result.windows, result.seq_len, evaluation.dtype


def _ratio(item: Measured, evaluation: Evaluated, model: str, wanted: _Timed | None) -> SpreadFigures | None:
    """Return the speed of a model relative to the dense model of the same run."""
    if model == DENSE:
        return _SAME
    if wanted is None:
        readings = [result.models[model].ratio for result in evaluation.texts if model in result.models]
        return next((reading for reading in readings if reading is not None), None)
    key = _case_key(*wanted)
    for bench in reversed(item.benches):
        name = bench.chosen if model == evaluation.chosen else model
        for case in bench.cases:
            if _case_key(bench, case) == key and name in case.models:
                return case.models[name].ratio
    return None


def _case_key(bench: Benched, case: BenchCase) -> tuple[object, ...]:
    return *runtime_key(bench), machine_words(bench), case.kind, case.batch, case.past, case.new
