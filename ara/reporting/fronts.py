"""Checkpoints of the same factors side by side: perplexity against size, quality against speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ara.reporting.document import (
    Allocated,
    BenchCase,
    Benched,
    Evaluated,
    Front,
    FrontPoint,
    SpeedFront,
    SpeedPoint,
    Spread,
    Stored,
    TextResult,
)
from ara.reporting.headline import longest_text, main_case, main_texts, main_zero_shot
from ara.reporting.results import DENSE, UNIFORM

# The dense model's speed relative to itself.
_SAME = Spread(median=1.0, low=1.0, high=1.0)


@dataclass(frozen=True)
class Measured:
    """One checkpoint with everything that was measured of it; ``current`` marks that of the report."""

    allocation: Allocated
    checkpoint: Stored
    evaluations: Sequence[Evaluated]
    benches: Sequence[Benched]
    current: bool

    def series(self, method: str) -> str:
        """Return which line a model of this checkpoint belongs to."""
        words = [method]
        if self.allocation.layout != "factors":
            words.append(self.allocation.layout)
        if self.checkpoint.densified:
            words.append("densified")
        return ", ".join(words)


def perplexity_fronts(measured: Sequence[Measured]) -> tuple[Front, ...]:
    """Return a front for every text that the current checkpoint has read; the others have read the same windows."""
    (current,) = [item for item in measured if item.current]
    fronts = []
    for evaluation, result in main_texts(current.evaluations):
        points: dict[tuple[str, float], FrontPoint] = {}
        for item in measured:
            for other, same in _same_text(item, evaluation, result):
                for point in _points(item, other, same):
                    points[point.series, point.linear_keep] = point
        ordered = sorted(points.values(), key=lambda point: (point.series, point.linear_keep))
        dense = result.models[DENSE].perplexity
        fronts.append(
            Front(task=result.task, windows=result.windows, seq_len=result.seq_len, dense=dense, points=tuple(ordered))
        )
    return tuple(fronts)


def _same_text(item: Measured, evaluation: Evaluated, result: TextResult) -> Iterator[tuple[Evaluated, TextResult]]:
    """Yield the evaluations that have read just the same windows in the same precision."""
    wanted = result.sha256 or result.task, result.windows, result.seq_len, evaluation.dtype
    for other in item.evaluations:
        for found in other.texts:
            if (found.sha256 or found.task, found.windows, found.seq_len, other.dtype) == wanted:
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
    """Return accuracy (where there is none, perplexity) against speed relative to dense, or ``None``."""
    (current,) = [item for item in measured if item.current]
    mean, case = main_zero_shot(current.evaluations), main_case(current.benches)
    text = longest_text(main_texts(current.evaluations))
    if mean is None and text is None:
        return None
    points: dict[tuple[str, str], SpeedPoint] = {}
    for item in measured:
        for evaluation in item.evaluations:
            for model in evaluation.models:
                if mean is not None:
                    quality = _accuracy(evaluation, mean[0], model.name)
                else:
                    assert text is not None
                    quality = _perplexity(item, evaluation, text, model.name)
                ratio = _ratio(item, evaluation, model.name, case)
                if quality is not None and ratio is not None:
                    point = _speed_point(item, evaluation, model.name, ratio, quality)
                    points[point.series, "" if model.name == DENSE else item.checkpoint.name] = point
    if not any(point.current for point in points.values()):
        return None
    ordered = sorted(points.values(), key=lambda point: (point.series != DENSE, point.series, point.checkpoint))
    return SpeedFront(
        measure="perplexity" if mean is None else "accuracy",
        task=text[1].task if mean is None and text else f"mean of {len(mean[1].tasks) if mean else 0} zero-shot tasks",
        speed="reading" if case is None else case_name(case[1]),
        points=tuple(ordered),
    )


def _speed_point(
    item: Measured, evaluation: Evaluated, model: str, ratio: Spread, quality: tuple[float, float | None]
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


def case_name(case: BenchCase) -> str:
    """Return a case of a benchmark in words."""
    batch = "" if case.batch == 1 else f", batch {case.batch}"
    if case.kind == "decode":
        return f"generating behind {case.past:,} tokens{batch}"
    return f"reading {case.new:,} tokens{batch}"


def _accuracy(evaluation: Evaluated, wanted: Evaluated, model: str) -> tuple[float, float | None] | None:
    """Return the mean accuracy over the same questions that ``wanted`` has asked, and its standard error."""
    mean = evaluation.zero_shot
    if mean is None or _questions(evaluation) != _questions(wanted) or model not in mean.models:
        return None
    return mean.models[model].value, mean.models[model].stderr


def _questions(evaluation: Evaluated) -> object:
    tasks = evaluation.zero_shot.tasks if evaluation.zero_shot else ()
    return tasks, {(row.task, row.metric, row.examples, row.seed) for row in evaluation.harness}


def _perplexity(
    item: Measured, evaluation: Evaluated, text: tuple[Evaluated, TextResult], model: str
) -> tuple[float, float | None] | None:
    for other, found in _same_text(item, *text):
        if other is evaluation and model in found.models:
            row = found.models[model]
            return row.perplexity, None if row.stderr is None else row.stderr * row.perplexity
    return None


def _ratio(
    item: Measured, evaluation: Evaluated, model: str, wanted: tuple[Benched, BenchCase] | None
) -> Spread | None:
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
    return bench.backend, bench.threads, case.kind, case.batch, case.past, case.new
