"""The model card (README.md) of a compressed checkpoint: what was done, and the numbers.

``ara truncate`` writes it with what is known then, ``ara report --model-card`` with all that was measured.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ara.artifacts.checkpoint import CheckpointResults
from ara.layouts import LAYOUTS
from ara.printable import printable
from ara.reporting.document import Evaluated, Report
from ara.reporting.gather import basic_report
from ara.reporting.sharing import shared_command
from ara.reporting.summary import main_texts
from ara.reporting.tables import (
    Cell,
    Table,
    bench_tables,
    harness_table,
    kinds_table,
    models_table,
    size_table,
    text_table,
)
from ara.workspace.manifest import Manifest

__all__ = ["card", "model_card", "shared_command"]

# Where model hubs know a text from, by what it is called in a report.
_DATASETS = {
    "WikiText-2": {"type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"},
    "C4": {"type": "allenai/c4", "config": "en", "split": "validation"},
}


def model_card(decomposition: Manifest, allocation: Manifest, results: CheckpointResults, dtype: str) -> str:
    """Return the card of a checkpoint that was just written, as Markdown with the front matter that model hubs read.

    Args:
        decomposition: manifest of the factors.
        allocation: manifest of the ranks.
        results: sizes of the checkpoint.
        dtype: precision of the stored weights.
    """
    return card(basic_report(decomposition, allocation, results, dtype))


def card(report: Report) -> str:
    """Return the card of a report, as Markdown with the front matter that model hubs read; no path of this machine."""
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- ara", "- svd", "- low-rank"]
    if report.base.kind == "hub":
        front.append(f"base_model: {_yaml_name(report.base.name)}")
    measured = any(evaluation.texts or evaluation.harness for evaluation in report.evaluations)
    sections = [
        "\n".join(["---", *front, *_model_index(report), "---"]),
        f"# {_escaped(report.title)}",
        *([_escaped(report.verdict)] if measured or report.benches else []),
        _what(report, measured),
        _markdown(size_table(report)),
        *_measurements(report),
        _markdown(kinds_table(report.allocation)),
        _loading(report),
        _reproduce(report),
    ]
    return printable("\n\n".join(sections) + "\n")


def _model_index(report: Report) -> list[str]:
    """Return the results in the form that model hubs show, as lines of YAML."""
    results = []
    for evaluation, result in main_texts(report.evaluations):
        name = f"perplexity, {result.windows} windows of {result.seq_len} tokens"
        metric = {"type": "perplexity", "name": name, "value": result.models[evaluation.chosen].perplexity}
        results.append((_dataset(result.task, result.origin), metric))
    for evaluation in report.evaluations:
        for task in evaluation.harness:
            found = task.models.get(evaluation.chosen)
            if found is not None:
                count = "" if task.examples is None else f", {task.examples} questions"
                metric = {"type": task.metric, "name": f"{task.metric}{count}", "value": found.value}
                results.append((_dataset(task.task), metric))
    if not results:
        return []
    lines = ["model-index:", f"- name: {_yaml(report.title)}", "  results:"]
    for dataset, metric in results:
        lines.append('  - task: {"type": "text-generation"}')
        lines.append(f"    dataset: {_yaml(dataset)}")
        lines.append(f"    metrics: {_yaml([metric])}")
    return lines


def _yaml(value: Any) -> str:
    """Return a value as YAML in one line: JSON is YAML, and quotes whatever a name may hold.

    Escapes of JSON alone are another matter: for a character beyond 16 bits it has two, which YAML takes for two.
    """
    return json.dumps(_shown(value), ensure_ascii=False)


def _shown(value: Any) -> Any:
    """Return a value with its texts printable: JSON would escape control characters, and YAML read them back."""
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _yaml_name(name: str) -> str:
    """Return a name as YAML, without quotes where it is as model hubs have them."""
    return name if re.fullmatch(r"[A-Za-z][\w.-]*/[\w.-]*\w", name, re.ASCII) else _yaml(name)


def _dataset(task: str, origin: str | None = None) -> dict[str, str]:
    """Return what a model hub shall call a text or task; config and split only of texts that came from the hub.

    Args:
        task: name in the report.
        origin: where the text came from, as it was recorded.
    """
    known = _DATASETS.get(task)
    if known is None:
        return {"name": task, "type": re.sub(r"[^\w.-]+", "-", task).strip("-") or "text"}
    from_hub = origin is not None and origin.startswith(f"Hugging Face hub {known['type']}")
    return {"name": task, **known} if from_hub else {"name": task, "type": known["type"]}


def _what(report: Report, measured: bool) -> str:
    factors, ranks, stored = report.decomposition, report.allocation, report.checkpoint
    text = (
        f"{factors.windows[0]} × {factors.windows[1]} tokens of {_escaped(factors.text)}" if factors.windows else "none"
    )
    shape = f"stored as {LAYOUTS.entry(ranks.layout).title}"
    shape = "multiplied back to dense weights" if stored.densified else shape
    lines = [
        f"{stored.low_rank_layers} linear layers of {_code(report.base.name)} were factorised by SVD and are {shape}; "
        f"{stored.dense_layers} stay dense, embeddings and head are untouched. No weight was trained.",
        "",
        f"- decomposition: {_code(factors.method)}, calibration text: {text}",
        f"- ranks: {_code(ranks.name)} ({_code(ranks.method)})",
    ]
    if not measured:
        lines.append(
            "- evaluation: run `ara eval` in the workspace; this card holds no quality figure that was not measured"
        )
    return "\n".join(lines)


def _measurements(report: Report) -> list[str]:
    """Return every table of quality and speed."""
    sections = []
    for evaluation in report.evaluations:
        sections.append(_captioned(models_table(evaluation)))
        sections += [_captioned(text_table(evaluation, result)) for result in evaluation.texts]
        sections += _harness(evaluation)
    for bench in report.benches:
        sections += [_captioned(table) for table in bench_tables(bench)]
    if sections:
        sections.insert(0, "## Measured\n\nMean ± standard error; uniform: the same share of every layer.")
    return sections


def _harness(evaluation: Evaluated) -> list[str]:
    return [_captioned(harness_table(evaluation))] if evaluation.harness or evaluation.zero_shot else []


def _captioned(table: Table) -> str:
    return f"{_escaped(table.caption)}:\n\n{_markdown(table)}"


def _markdown(table: Table) -> str:
    lines = [
        f"| {' | '.join(_escaped(column) for column in table.columns)} |".replace("|  |", "| |"),
        "|" + "---|" * table.words + "---:|" * (len(table.columns) - table.words),
    ]
    for number, row in enumerate(table.rows):
        cells = [_cell(cell, number == table.marked) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cell: Cell, marked: bool) -> str:
    # A bar would end the cell, even in code.
    text = _code(cell.text).replace("|", "\\|") if cell.code else _escaped(cell.text)
    return f"**{text}**" if marked and text else text


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, in a cell of a table, too."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return text as a code span: in one line, fenced by more back-ticks than it has in a row."""
    text = " ".join(text.split())
    fence = "`" * (_backticks(text) + 1)
    # One blank on each side is taken off again, and keeps a back-tick at an end from the fence.
    return f"{fence} {text} {fence}" if "`" in text or not text else f"{fence}{text}{fence}"


def _backticks(text: str) -> int:
    """Return the length of the longest run of back-ticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _loading(report: Report) -> str:
    if report.checkpoint.densified:
        return "Loads like any dense checkpoint, and is as large as one."
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "import ara  # pip install ara-svd; or leave this out and pass trust_remote_code=True\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        "```"
    )


def _reproduce(report: Report) -> str:
    base = report.base
    versions = ", ".join(f"{package} {' and '.join(known)}" for package, known in report.versions.items())
    model = {"kind": base.kind, "location": base.name, "requested": base.requested}
    commands = "\n".join(dict.fromkeys(shared_command(item.command, model) for item in report.work))
    # A prompt in a command may span lines, and hold a fence of its own.
    fence = "`" * max(3, _backticks(commands) + 1)
    return (
        f"Made by\n\n{fence}\n{commands}\n{fence}\n\n"
        f"with {_escaped(versions)}; seed {report.decomposition.seed}; "
        f"base model fingerprint {_code(base.fingerprint)}."
    )
