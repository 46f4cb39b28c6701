"""The tables of ``ara eval``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from ara.evaluation.tasks import ZERO_SHOT
from ara.workspace.view import StageView
from ara_cli.console import Console
from ara_cli.render_eval import show_evaluation
from tests.reported import NAME, evaluation

VARIANT = {"parameters": 1_000_000, "weight_bytes": 2 << 20, "linear_keep": 0.8, "model_keep": 0.84}
MODELS = ("dense", "uniform", NAME)


def task(metric: str = "acc", values: tuple[float, ...] = (0.5, 0.4, 0.45), stderr: float | None = 0.025) -> Any:
    """Return the figures of one task."""
    kept = [None if stderr is None else value / values[0] for value in values]
    rows = zip(MODELS, values, kept, strict=True)
    return {
        "kind": "harness",
        "text": "made up",
        "metric": metric,
        "examples": 400,
        "of": 2376,
        "seed": 0,
        "models": {
            name: {"value": value, "stderr": stderr, "retained": share, "metrics": {}, "stderrs": {}}
            for name, value, share in rows
        },
        "compared": {
            "dense": {"difference": values[2] - values[0], "p": 0.3, "test": ""},
            "uniform": {"difference": values[2] - values[1], "p": 3.2e-7, "test": ""},
        }
        if stderr is not None
        else {},
    }


def shown(tasks: dict[str, Any], mean_over: tuple[str, ...] = (), continued: tuple[Any, ...] = ()) -> list[str]:
    """Return the lines of the tables."""
    mean = None
    if mean_over:
        found = task()
        rows = {name: {**row, "mean": row["value"]} for name, row in found["models"].items()}
        mean = {"tasks": list(mean_over), "models": rows, "compared": found["compared"]}
    manifest = evaluation()
    results = {
        **manifest.results,
        "variants": dict.fromkeys(MODELS, VARIANT),
        "tasks": tasks,
        "zero_shot": mean,
        "continuations": list(continued),
    }
    out = io.StringIO()
    view = StageView("eval/x", Path(), "done", manifest=manifest.model_copy(update={"results": results}))
    show_evaluation(Console(stdout=out, stderr=out), view)
    return out.getvalue().splitlines()


def row_of(lines: list[str], start: str) -> str:
    (found,) = [line for line in lines if line.lstrip().startswith(start)]
    return found


def test_the_mean_says_of_what() -> None:
    assert row_of(shown({"piqa": task()}, ZERO_SHOT), "mean of zero-shot")
    assert row_of(shown({"piqa": task()}, ("piqa", "copa", "boolq")), "mean of 3 tasks")


def test_every_compressed_model_is_compared_in_the_width_of_a_terminal() -> None:
    lines = shown({"arc_challenge": task(), "wikitext": task("word_perplexity", (30.2, 41.0, 35.5), None)}, ZERO_SHOT)
    header = row_of(lines, "task")
    assert header.count("kept of dense") == 2 and "Δ dense (p)" in header and "Δ uniform (p)" in header
    for start in ("arc_challenge", "mean of zero-shot"):
        cells = row_of(lines, start).split("  ")
        values = [cell.strip() for cell in cells if cell.strip()][-7:]
        kept = ["50.0 ± 2.5 %", "40.0 ± 2.5 %", "80.0%", "45.0 ± 2.5 %", "90.0%"]
        assert values == [*kept, "≈ -5.0 (0.3)", "+5.0 (3e-07)"]
    assert row_of(lines, "wikitext").split()[-7:] == ["30.20", "41.00", "–", "35.50", "–", "–", "–"]
    assert max(map(len, lines[lines.index(header) :])) <= 160


def test_answers_in_chat() -> None:
    distance = {"kl": 1.479, "kl_stderr": 0.1234, "agreement": 0.413}
    models = {
        "dense": {"divergence": None, "empty": 0},
        "uniform": {"divergence": {**distance, "kl_stderr": None}, "empty": 24},
        NAME: {"divergence": distance, "empty": 23},
    }
    facts = {"kind": "chat", "text": "made up", "conversations": 24, "of": 252, "seed": 0, "seq_len": 2048}
    facts |= {"too_long": 0, "dense_answers": 0, "answer_tokens": 1234, "max_new_tokens": 40, "models": models}
    lines = shown({"chat": facts})
    assert row_of(lines, "chat:") == "chat: 24 of 252 conversations, 1,234 tokens of answers"
    table = lines[lines.index("chat: 24 of 252 conversations, 1,234 tokens of answers") :]
    assert row_of(table, "dense").split("  ")[-1].strip() == "0 of 24"
    assert "1.479 ± 0.123" in row_of(table, NAME) and "41.3%" in row_of(table, NAME)
    assert row_of(table, NAME).endswith("23 of 24")
    assert "1.479 " in row_of(table, "uniform") and "±" not in row_of(table, "uniform")
    (own,) = [line for line in shown({"chat": {**facts, "dense_answers": 24, "too_long": 3}}) if "own" in line]
    assert own == (
        "chat: 24 of 252 conversations, 1,234 tokens of answers, all of them the dense model's own; "
        "3 longer ones left out"
    )


def test_an_empty_continuation_is_said_to_be_one() -> None:
    models = dict(zip(MODELS, (" he said\nso", "", " \n"), strict=True))
    lines = shown({}, continued=({"prompt": "So", "models": models},))
    assert lines[-4:] == ["“So …”", "  dense: … he said so", "  uniform: … (empty)", f"  {NAME}: … (empty)"]


@pytest.mark.parametrize(
    ("metric", "values", "stderr", "words"),
    [
        ("rouge1", (25.3, 20.0, 22.5), 0.4, ["25.30 ± 0.40", "22.50 ± 0.40", "≈ -2.80 (0.3)"]),
        ("rouge1", (0.253, 0.2, 0.225), None, ["0.25", "0.23"]),
        ("acc_norm", (0.5, 0.4, 0.45), 0.02, ["50.0 ± 2.0 %", "≈ -5.0 (0.3)"]),
        ("f1", (0.5, 0.4, 0.45), None, ["50.0 %", "45.0 %"]),
        ("f1", (50.0, 40.0, 0.45), 0.5, ["50.00 ± 0.50", "0.45 ± 0.50", "≈ -49.55 (0.3)"]),
    ],
)
def test_only_shares_are_per_cent(metric: str, values: Any, stderr: float | None, words: list[str]) -> None:
    row = row_of(shown({"made": task(metric, values, stderr)}), "made")
    for word in words:
        assert f" {word}" in row, row
