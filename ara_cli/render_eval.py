"""Tables of ``ara eval``: perplexity and speed, accuracy on tasks, and what the models write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ara.evaluation.tasks import mean_label
from ara.stage_view import StageView
from ara_cli.console import Column, Console
from ara_cli.words import count_text, percent

# Differences with a larger p are marked as noise.
NOISE = 0.05


def show_evaluation(console: Console, view: StageView) -> None:
    """Show all models of an evaluation side by side."""
    assert view.manifest is not None
    results = view.manifest.results
    texts = {name: task for name, task in results["tasks"].items() if task["kind"] == "text"}
    tasks = {name: task for name, task in results["tasks"].items() if task["kind"] == "harness"}
    _show_texts(console, results, texts)
    if tasks:
        _show_tasks(console, results, tasks)
    for continued in results["continuations"]:
        console.text(f"“{continued['prompt']} …”")
        for name, text in continued["models"].items():
            console.text(f"  {name}: … {_one_line(text)}")


def _show_texts(console: Console, results: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    columns = [Column("model", "left")]
    for name, text in texts.items():
        columns.append(Column(f"{name} perplexity ({text['windows']} × {text['seq_len']} tokens)"))
        columns += [Column("KL from dense, nats"), Column("same token")]
    columns += [Column("parameters"), Column("linear kept"), Column("model kept"), Column("weights (MiB)")]
    busiest = max(texts.values(), key=lambda text: text["windows"] * text["seq_len"]) if texts else None
    if busiest:
        columns.append(Column("tokens/s (p10 – p90)"))
    rows = []
    for name, figures in results["variants"].items():
        cells: list[Any] = [name]
        for text in texts.values():
            row = text["models"][name]
            distance = row["divergence"]
            cells.append(f"{row['perplexity']:,.2f}")
            cells += [f"{distance['kl']:.3f}", percent(distance["agreement"])] if distance else ["–", "–"]
        cells += [
            count_text(figures["parameters"]),
            percent(figures["linear_keep"]),
            percent(figures["model_keep"]),
            f"{figures['weight_bytes'] / 2**20:,.1f}",
        ]
        if busiest:
            speed = busiest["models"][name]["tokens_per_second"]
            cells.append(f"{speed['median']:,.0f} ({speed['low']:,.0f} – {speed['high']:,.0f})")
        rows.append(cells)
    order = ", on the same windows in turn" if results["interleaved"] else ", one after the other"
    console.table(f"Dense, uniform and chosen{order if texts else ''}", columns, rows)


def _show_tasks(console: Console, results: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Show accuracy ± standard error; a difference that may be chance is marked."""
    models, chosen = list(results["variants"]), results["chosen"]
    rival = "uniform" if "uniform" in models and chosen != "uniform" else None
    columns = [Column("task", "left"), Column("metric", "left"), Column("questions"), *(Column(m) for m in models)]
    columns.append(Column("kept of dense"))
    if rival:
        columns += [Column(f"{chosen} − {rival}"), Column("p")]
    rows = []
    for name, task in tasks.items():
        scores = [_score(task["models"][model]["value"], task["models"][model]["stderr"]) for model in models]
        cells = [name, task["metric"], f"{task['examples']:,} of {task['of']:,}", *scores]
        cells.append(_retained(task["models"][chosen]["retained"]))
        rows.append([*cells, *(_difference(task["compared"].get(rival)) if rival else [])])
    mean = results["zero_shot"]
    if mean:
        scores = [_score(mean["models"][model]["mean"], mean["models"][model]["stderr"]) for model in models]
        cells = [mean_label(mean["tasks"]), "acc", "", *scores, _retained(mean["models"][chosen]["retained"])]
        rows.append([*cells, *(_difference(mean["compared"].get(rival)) if rival else [])])
    console.table("Tasks of lm-eval", columns, rows)
    if rival:
        console.text(f"≈ marks what may be chance: p > {NOISE}, same questions for both models")


def _score(value: float, stderr: float | None) -> str:
    return f"{value:,.2f}" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def _retained(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["–", "–"]
    mark = "≈ " if found["p"] > NOISE else ""
    return [f"{mark}{100 * found['difference']:+.1f}", f"{found['p']:.2g}"]


def _one_line(text: str) -> str:
    return " ".join(text.split())
