"""Tables of ``ara bench``."""

from __future__ import annotations

from collections.abc import Sequence

from ara.artifacts.benchmark import (
    BenchmarkResults,
    BenchmarkSettings,
    CaseResults,
    Percentiles,
    RatioFigures,
    ServingCase,
)
from ara.workspace.view import StageView
from ara_cli.console import Column, Console, columns
from ara_cli.formatting import count_text
from ara_cli.shown import shows_results


@shows_results
def show_bench(console: Console, view: StageView) -> None:
    """Show the sizes and speeds of the models, relative to the dense one, with the predicted ratios."""
    results = BenchmarkResults.read(view)
    threads = f"{results.threads} thread{'s' if results.threads > 1 else ''}"
    where = f"{results.backend}, {results.device}, {results.precision}, {threads}"
    rows = [
        (name, count_text(row.parameters), _mib(row.weight_bytes), _mib(row.disk_bytes), _mib(row.peak_memory_bytes))
        for name, row in results.models.items()
    ]
    headers = columns("model", "parameters", "weights (MiB)", "on disk (MiB)", "peak memory (MiB)")
    console.table(f"Sizes: {where}", headers, rows)
    if results.serving is not None:
        _show_serving(console, results, results.serving, BenchmarkSettings.read(view).rounds)
        return
    figures = ("ms", "tokens/s (p10 – p90)", "times as fast as dense (95 % interval)", "predicted", "off by")
    order = "in turn" if results.interleaved else "one after the other"
    console.table(
        f"Speed: models {order}, medians of {BenchmarkSettings.read(view).rounds} rounds",
        [Column("case", "left"), *columns("model", *figures)],
        [_row(case, name) for case in results.cases for name in results.models],
    )


def _show_serving(console: Console, results: BenchmarkResults, cases: Sequence[ServingCase], rounds: int) -> None:
    """Show the speed of answers to requests."""
    lengths = f"prompts of {cases[0].prompt:,} tokens, answers of {cases[0].new:,}"
    order = "in turn" if results.interleaved else "one after the other"
    rows = [
        (
            f"{case.requests:,}",
            name,
            _spread(row.output_tokens_per_second, "{:,.1f}"),
            _spread(row.first_token_seconds, "{:,.0f}", 1000),
            _times(row.ratio) if name != next(iter(case.models)) else None,
        )
        for case in cases
        for name, row in case.models.items()
    ]
    figures = ("output tokens/s (p10 – p90)", "first token, ms (p10 – p90)", "times as fast as dense (95 % interval)")
    console.table(
        f"Requests: {lengths}; models {order}, medians of {rounds} rounds",
        [Column("at once"), *columns("model", *figures)],
        rows,
    )


def bench_figure(view: StageView) -> str:
    """Return the smallest and the largest speed-up in one line; without one if the models did not run in turn."""
    results = BenchmarkResults.read(view)
    rows = [case.models[results.chosen].ratio for case in results.cases]
    rows += [case.models[results.chosen].ratio for case in results.serving or ()]
    ratios = [ratio.median for ratio in rows if ratio]
    if not ratios:
        return f"speeds that cannot be compared with dense ({results.backend})"
    return f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as dense ({results.backend})"


def _row(case: CaseResults, name: str) -> tuple[str | None, ...]:
    row = case.models[name]
    what = f"decode at {case.past}" if case.kind == "decode" else f"prefill {case.new}"
    speed, ratio = row.tokens_per_second, row.ratio
    is_dense = name == next(iter(case.models))
    return (
        f"{what}, batch {case.batch}",
        name,
        f"{1000 * row.seconds.median:,.1f}",
        _spread(speed, "{:,.0f}"),
        None if is_dense else _times(ratio),
        None if is_dense else f"{row.predicted:.2f}",
        f"{ratio.median / row.predicted - 1:+.0%}" if ratio and not is_dense else None,
    )


def _spread(values: Percentiles, form: str, unit: float = 1) -> str:
    median, p10, p90 = (form.format(unit * value) for value in (values.median, values.p10, values.p90))
    return f"{median} ({p10} – {p90})"


def _times(ratio: RatioFigures | None) -> str | None:
    return None if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f})"


def _mib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:,.1f}"
