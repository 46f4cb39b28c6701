"""Tables of ``ara eval``: perplexity and speed, answers in chat, scores on tasks, continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ara.artifacts.evaluation import (
    DENSE,
    EMPTY_TEXT,
    ChatResults,
    EvaluationResults,
    MeanFigures,
    PairedDifference,
    TaskFigures,
)
from ara.evaluation.paired import NOISE
from ara.evaluation.tasks import mean_label
from ara.workspace.view import StageView
from ara_cli.console import Column, Console
from ara_cli.formatting import count_text, percent
from ara_cli.shown import shows_results

# Metrics that are shares of questions or of words; so is every metric that begins with acc.
_SHARES = {"exact_match", "em", "f1", "contains", "precision", "recall", "mc1", "mc2", "pass@1"}


@shows_results
def show_evaluation(console: Console, view: StageView) -> None:
    """Show all models of an evaluation side by side."""
    results = EvaluationResults.read(view)
    _show_texts(console, results)
    for name, chat in results.chats.items():
        _show_chat(console, results, name, chat)
    if results.harness:
        _show_tasks(console, results)
    for continued in results.continuations:
        console.text(f"“{continued.prompt} …”")
        for name, text in continued.models.items():
            console.text(f"  {name}: … {_one_line(text) or EMPTY_TEXT}")


def _show_texts(console: Console, results: EvaluationResults) -> None:
    texts = results.texts
    columns = [Column("model", "left")]
    for name, text in texts.items():
        columns.append(Column(f"{name} perplexity ({text.windows} × {text.seq_len} tokens)"))
        columns += [Column("KL from dense, nats"), Column("same token")]
    columns += [Column("parameters"), Column("linear kept"), Column("model kept"), Column("weights (MiB)")]
    busiest = max(texts.values(), key=lambda text: text.windows * text.seq_len) if texts else None
    if busiest:
        columns.append(Column("tokens/s (p10 – p90)"))
    rows = []
    for name, figures in results.variants.items():
        cells: list[Any] = [name]
        for text in texts.values():
            row = text.models[name]
            distance = row.divergence
            cells.append(f"{row.perplexity:,.2f}")
            cells += [f"{distance.kl:.3f}", percent(distance.agreement)] if distance else ["–", "–"]
        cells += [
            count_text(figures.parameters),
            percent(figures.linear_keep),
            percent(figures.model_keep),
            f"{figures.weight_bytes / 2**20:,.1f}",
        ]
        if busiest:
            speed = busiest.models[name].tokens_per_second
            cells.append(f"{speed.median:,.0f} ({speed.low:,.0f} – {speed.high:,.0f})")
        rows.append(cells)
    order = ", on the same windows in turn" if results.interleaved else ", one after the other"
    where = f", in {results.runtime}" if results.runtime else ""
    console.table(f"Dense, uniform and chosen{order if texts else ''}{where}", columns, rows)


def _show_chat(console: Console, results: EvaluationResults, name: str, chat: ChatResults) -> None:
    """Show every model's distance from the dense model on the answers of conversations, and its empty answers."""
    columns = [Column("model", "left"), Column("KL from dense, nats"), Column("same token"), Column("empty answers")]
    rows = []
    for model in results.variants:
        figures = chat.models[model]
        distance = figures.divergence
        cells = ["–", "–"]
        if distance is not None:
            error = "" if distance.kl_stderr is None else f" ± {distance.kl_stderr:.3f}"
            cells = [f"{distance.kl:.3f}{error}", percent(distance.agreement)]
        rows.append([model, *cells, f"{figures.empty:,} of {chat.conversations:,}"])
    console.table(f"{name}: {chat.sample}", columns, rows)


def _show_tasks(console: Console, results: EvaluationResults) -> None:
    """Show every model's score ± standard error, and differences with p; ≈ marks those that may be chance."""
    models, chosen = list(results.variants), results.chosen
    rivals = [name for name in models if name != chosen]
    columns = [Column("task", "left"), Column("metric", "left"), Column("questions")]
    for model in models:
        columns += [Column(model), *([Column("kept of dense")] if model != DENSE else [])]
    columns += [Column(f"Δ {rival} (p)") for rival in rivals]

    def cells(
        rows: Mapping[str, TaskFigures] | Mapping[str, MeanFigures],
        values: Mapping[str, float],
        metric: str,
        compared: Mapping[str, PairedDifference],
    ) -> list[str]:
        share = _is_share(metric, values.values())
        found = []
        for model in models:
            found.append(_score(values[model], rows[model].stderr, share))
            found += [_retained(rows[model].retained)] if model != DENSE else []
        return [*found, *(_difference(compared.get(rival), share) for rival in rivals)]

    rows = []
    for name, task in results.harness.items():
        first = [name, task.metric, f"{task.examples:,} of {task.of:,}"]
        values = {model: row.value for model, row in task.models.items()}
        rows.append([*first, *cells(task.models, values, task.metric, task.compared)])
    mean = results.zero_shot
    if mean:
        first = [mean_label(mean.tasks), "acc", ""]
        values = {model: row.mean for model, row in mean.models.items()}
        rows.append([*first, *cells(mean.models, values, "acc", mean.compared)])
    console.table("Tasks of lm-eval", columns, rows)
    if rivals:
        console.text(f"Δ: {chosen} minus the other model, on the same questions; ≈: may be chance (p > {NOISE})")


def _is_share(metric: str, values: Iterable[float]) -> bool:
    """Tell whether the values of a metric are shares, to be shown in per cent."""
    return (metric in _SHARES or metric.startswith("acc")) and all(0 <= value <= 1 for value in values)


def _score(value: float, stderr: float | None, share: bool) -> str:
    if not share:
        return f"{value:,.2f}" if stderr is None else f"{value:,.2f} ± {stderr:,.2f}"
    return f"{100 * value:.1f} %" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def _retained(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _difference(found: PairedDifference | None, share: bool) -> str:
    if found is None:
        return "–"
    mark = "≈ " if found.p > NOISE else ""
    difference = f"{100 * found.difference:+.1f}" if share else f"{found.difference:+.2f}"
    p = f"{found.p:.2g}" if found.p >= 0.001 else f"{found.p:.0e}"
    return f"{mark}{difference} ({p})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
