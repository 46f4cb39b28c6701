"""The model card (README.md) of a compressed checkpoint: how it was made, and its figures.

``ara truncate`` writes it without measurements, ``ara report --model-card`` with all of them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ara.artifacts.checkpoint import CheckpointResults
from ara.layouts import LAYOUTS
from ara.models.multimodal import auto_name, reads_text_alone
from ara.printable import printable
from ara.reporting.cells import Cell, Table
from ara.reporting.checkpoint_parts import Stored
from ara.reporting.document import Report
from ara.reporting.gather import basic_report
from ara.reporting.sharing import shared_command
from ara.reporting.summary import main_texts, recovery_words, rounding_words
from ara.reporting.tables import (
    bench_tables,
    chat_table,
    harness_table,
    kinds_table,
    models_table,
    recovery_tables,
    size_table,
    text_table,
)
from ara.workspace.manifest import Manifest

# Data sets on model hubs, by the name of the text in a report.
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
    """Return the card of a report, as Markdown with the front matter that model hubs read, without local paths."""
    pictures = auto_name(report.base.architecture) == "AutoModelForImageTextToText"
    task = "image-text-to-text" if pictures else "text-generation"
    front = ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- ara", "- svd", "- low-rank"]
    if report.base.kind == "hub":
        front.append(f"base_model: {_yaml_name(report.base.name)}")
    measured = any(evaluation.texts or evaluation.harness or evaluation.chats for evaluation in report.evaluations)
    sections = [
        "\n".join(["---", *front, *_model_index(report), "---"]),
        f"# {_escaped(report.title)}",
        *([_escaped(report.verdict)] if measured or report.benches else []),
        _what(report, measured),
        _markdown(size_table(report)),
        *_measurements(report),
        *(_captioned(table) for table in recovery_tables(report.checkpoint)),
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
                name = f"{task.metric}, {task.examples} questions"
                metric = {"type": task.metric, "name": name, "value": found.value}
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
    """Return a value as YAML in one line: JSON is YAML, and quotes any name.

    JSON would escape a character beyond 16 bits as two, which YAML reads as two characters: nothing is escaped.
    """
    return json.dumps(_shown(value), ensure_ascii=False)


def _shown(value: Any) -> Any:
    """Return a value with printable texts: JSON would escape control characters, and YAML restore them."""
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _yaml_name(name: str) -> str:
    """Return a name as YAML, without quotes if it has the form of a hub id."""
    return name if re.fullmatch(r"[A-Za-z][\w.-]*/[\w.-]*\w", name, re.ASCII) else _yaml(name)


def _dataset(task: str, origin: str | None = None) -> dict[str, str]:
    """Return a text or task as a model hub names it; config and split only for texts that came from the hub."""
    known = _DATASETS.get(task)
    if known is None:
        return {"name": task, "type": re.sub(r"[^\w.-]+", "-", task).strip("-") or "text"}
    from_hub = origin is not None and origin.startswith(f"Hugging Face hub {known['type']}")
    return {"name": task, **known} if from_hub else {"name": task, "type": known["type"]}


def _what(report: Report, measured: bool) -> str:
    factors, ranks, stored = report.decomposition, report.allocation, report.checkpoint
    text = (
        f"{factors.windows[0]} × {factors.windows[1]} tokens of {_escaped(factors.text)}"
        if factors.windows and factors.text
        else "none"
    )
    shape = f"stored as {LAYOUTS.entry(ranks.layout).title}"
    shape = "multiplied back to dense weights" if stored.densified else shape
    lines = [
        f"{stored.low_rank_layers} linear layers of {_code(report.base.name)} were factorised by SVD and are {shape}; "
        f"{stored.dense_layers} stay dense, embeddings and head are untouched. " + _changes(stored),
        "",
        f"- decomposition: {_code(factors.method)}, calibration text: {text}",
        f"- ranks: {_code(ranks.name)} ({_code(ranks.method)})",
    ]
    if not measured:
        lines.append(
            "- evaluation: run `ara eval` in the workspace; this card holds no quality figure that was not measured"
        )
    return "\n".join(lines)


def _changes(stored: Stored) -> str:
    """Return what has changed values after the truncation, in the order in which it was done."""
    before, after = stored.recovery, stored.recovery_after_rounding
    sentences = [recovery_words(before)] if before else [] if after else ["No weight was trained."]
    sentences += [rounding_words(stored.rounding)] if stored.rounding else []
    sentences += [recovery_words(after, after_rounding=True)] if after else []
    return " ".join(sentences)


def _measurements(report: Report) -> list[str]:
    """Return all tables of quality and speed."""
    sections = []
    for evaluation in report.evaluations:
        sections.append(_captioned(models_table(evaluation)))
        sections += [_captioned(text_table(evaluation, result)) for result in evaluation.texts]
        sections += [_captioned(chat_table(evaluation, result)) for result in evaluation.chats]
        if evaluation.harness or evaluation.zero_shot:
            sections.append(_captioned(harness_table(evaluation)))
    for bench in report.benches:
        sections += [_captioned(table) for table in bench_tables(bench)]
    if sections:
        sections.insert(0, "## Measured\n\nMean ± standard error; uniform: the same share of every layer.")
    return sections


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
    # A bar ends the cell, even in code.
    text = _code(cell.text).replace("|", "\\|") if cell.code else _escaped(cell.text)
    return f"**{text}**" if marked and text else text


def _escaped(text: str) -> str:
    """Return text in one line, escaped so that Markdown shows it unchanged, also in a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return text as a code span in one line, fenced by more back-ticks than its longest run."""
    text = " ".join(text.split())
    fence = "`" * (_backticks(text) + 1)
    # Markdown strips the blank on each side; it separates a back-tick at an end from the fence.
    return f"{fence} {text} {fence}" if "`" in text or not text else f"{fence}{text}{fence}"


def _backticks(text: str) -> int:
    """Return the length of the longest run of back-ticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _loading(report: Report) -> str:
    if report.checkpoint.densified:
        return "Loads like any dense checkpoint, and is as large as one."
    auto = auto_name(report.base.architecture)
    reader = "tokenizer = AutoTokenizer" if reads_text_alone(report.base.architecture) else "processor = AutoProcessor"
    return (
        "```python\n"
        f"from transformers import {auto}, {reader.rpartition(' ')[2]}\n\n"
        "import ara  # pip install ara-svd; or leave this out and pass trust_remote_code=True\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\n'
        f'{reader}.from_pretrained("FOLDER")\n'
        "```"
    )


def _reproduce(report: Report) -> str:
    base = report.base
    versions = ", ".join(f"{package} {' and '.join(known)}" for package, known in report.versions.items())
    model = {"kind": base.kind, "location": base.name, "requested": base.requested}
    commands = "\n".join(dict.fromkeys(shared_command(item.command, model) for item in report.work))
    # A prompt in a command may span lines and contain a fence.
    fence = "`" * max(3, _backticks(commands) + 1)
    return (
        f"Made by\n\n{fence}\n{commands}\n{fence}\n\n"
        f"with {_escaped(versions)}; seed {report.decomposition.seed}; "
        f"base model fingerprint {_code(base.fingerprint)}."
    )
