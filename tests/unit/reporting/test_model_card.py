"""The card is made to be shared: it names what was done and nothing of the machine it was done on."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ara.artifacts.checkpoint import CheckpointResults
from ara.data.texts import load_documents
from ara.reporting.gather import Made, gather
from ara.reporting.model_card import card, model_card
from ara.reporting.sharing import shared_command
from ara.workspace.manifest import FORMAT_VERSION, Manifest
from tests import reported
from tests.reported import allocation, bare, sources, truncated

_HUB = {"kind": "hub", "requested": "owner/name", "location": "owner/name", "fingerprint": "f" * 40}
_FOLDER = {"kind": "folder", "requested": "work/llama", "location": "/home/me/work/llama", "fingerprint": "f" * 64}
_RESULTS = {
    "model_keep": 0.75,
    "linear_keep": 0.7,
    "low_rank_layers": 13,
    "dense_layers": 1,
    "densified": False,
    "parameters": 90,
    "weight_bytes": 4 << 20,
    "dense_weight_bytes": 5 << 20,
    "disk_bytes": 4 << 20,
}


def _manifest(stage: str, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "name": "energy-0.70",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "ara (library call)",
        "config": {"method": "whitened", "rank_multiple": 1, "min_rank": 1, "min_keep": 0.0, "exclude": []},
        "model": _FOLDER,
        "seed": 3,
        "versions": {"ara": "0.1.0"},
        "seconds": 1.5,
        "peak_memory_bytes": 7,
        "files": {},
    }
    return Manifest(**{**values, **changes})


def _card(command: str, text: str, origin: str, model: dict[str, str] = _FOLDER) -> str:
    windows = {"windows": [7, 31], "text": origin, "modules": [], "model_parameters": 120, "linear_parameters": 100}
    decomposition = _manifest(
        "decompose",
        model=model,
        command=command,
        config={"method": "whitened", "text": text, "samples": 7, "seq_len": 31, "seed": 3, "dtype": "float32"},
        results=windows,
    )
    figures: dict[str, Any] = {
        "linear_parameters_dense": 100,
        "linear_parameters": 70,
        "model_parameters_dense": 120,
        "model_parameters": 90,
        "kinds": {},
    }
    allocation = _manifest("allocate", results={**figures, **_RESULTS})
    return model_card(decomposition, allocation, CheckpointResults.parse(_RESULTS), "float32")


def test_no_folder_of_this_machine_is_in_the_card() -> None:
    command = "ara run /home/me/work/llama --text file:/home/me/secret/story.jsonl -w /home/me/ws --prompt 'yes/no?'"
    card = _card(command, "file:/home/me/secret/story.jsonl", "file /home/me/secret/story.jsonl")
    assert "/home" not in card and "secret" not in card
    assert "7 × 31 tokens of file:story.jsonl" in card
    assert "ara run llama --text file:story.jsonl -w ws --prompt 'yes/no?'" in card
    assert "\n# llama, compressed by ARA to 75.0%" in card


def test_a_named_text_is_named_wherever_its_file_lies() -> None:
    assert "7 × 31 tokens of c4\n" in _card("ara decompose x", "c4", "file /data/c4_sample/c4_rp1.jsonl")


def test_a_hub_model_keeps_its_id() -> None:
    card = _card("ara decompose owner/name", "c4", "hub", _HUB)
    assert "\nara decompose owner/name\n" in card
    assert "base_model: owner/name" in card


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("ara decompose /a/b/llama", "ara decompose llama"),
        ("ara decompose ./b/llama/", "ara decompose llama"),
        ("ara decompose ../llama", "ara decompose llama"),
        ("ara decompose '~/my models/llama'", "ara decompose llama"),
        ("ara decompose work/llama", "ara decompose llama"),  # what the model was asked for as
        ("ara decompose here/llama.gguf", "ara decompose llama.gguf"),  # exists
        ("ara decompose owner/name --revision refs/pr/3", "ara decompose owner/name --revision refs/pr/3"),
        ("ara truncate -w runs/first", "ara truncate -w first"),
        ("ara truncate -wruns/first", "ara truncate -wfirst"),
        ("ara truncate -qw runs/first", "ara truncate -qw first"),
        ("ara truncate --workspace=runs/first -q", "ara truncate --workspace=first -q"),
        ("ara truncate -w . --name a", "ara truncate -w . --name a"),
        ("ara allocate --ranks edited/mine.json", "ara allocate --ranks mine.json"),
        ("ara eval --tasks wikitext2,file:/a/x.txt,file:b/y.txt", "ara eval --tasks wikitext2,file:x.txt,file:y.txt"),
        ("ara eval --tasks=file:~/x.txt", "ara eval --tasks=file:x.txt"),
        ("ara eval --tasks 'c4,file:/a/b,c/d,e.txt,piqa'", "ara eval --tasks c4,file:d,e.txt,piqa"),
        ("ara eval --include-path own/tasks --tasks x", "ara eval --include-path tasks --tasks x"),
        ("ara eval --tasks file:/a/x.jsonl#content", "ara eval --tasks 'file:x.jsonl#content'"),
        ("ara decompose m -O file=/a/scales.json", "ara decompose m -O file=scales.json"),
        ("ara run m --prompt '/home and/or ./x'", "ara run m --prompt '/home and/or ./x'"),
        ("ara run m --keep 0.8 -m energy --exclude '*.down_proj'", None),
        ("ara (library call)", None),
        ("a quote' /a/b", "a 'quote'\"'\"'' b"),  # not the words of a shell
    ],
)
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, shown: str | None) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "llama.gguf").touch()
    monkeypatch.chdir(tmp_path)
    model = _HUB if "owner" in typed else _FOLDER
    assert shared_command(typed, model) == (typed if shown is None else shown)


def test_the_full_card_holds_what_was_measured() -> None:
    report = gather(sources())
    text = card(report)
    assert "/home" not in text and "secret" not in text
    assert report.verdict in text
    for evaluation in report.evaluations:
        for result in evaluation.texts:
            for row in result.models.values():
                assert f"{row.perplexity:.2f} ± " in text
    assert "| **ara-0.80** | **30.23 ± 0.76** |" in text
    assert "| generating after 512 tokens | ara-0.80 | 17.4 (15.7 – 20.9) |" in text
    assert "ara train-masks -w ws --name priced" in text
    assert "run `ara eval`" not in text


def test_model_hubs_read_the_results() -> None:
    from huggingface_hub import ModelCard

    report = gather(sources())
    found = ModelCard(card(report)).data
    assert found.library_name == "transformers" and "ara" in found.tags
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in found.eval_results}
    chosen = report.evaluations[0].texts[0].models["ara-0.80"]
    assert results["Salesforce/wikitext", "perplexity"] == chosen.perplexity
    assert results["piqa", "acc"] == 0.57
    assert len(results) == 4
    assert ModelCard(card(gather(bare()))).data.eval_results is None


@pytest.mark.parametrize(
    ("task", "origin", "expected"),
    [
        ("c4", "file /data/c4_sample/c4_rp2.jsonl", ("allenai/c4", None, None)),
        ("c4", "", ("allenai/c4", None, None)),
        ("c4", None, ("allenai/c4", "en", "validation")),
        ("wikitext2", "file /data/wikitext2_raw/test.jsonl", ("Salesforce/wikitext", None, None)),
        ("wikitext2", None, ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
    ],
)
def test_a_split_is_named_only_of_a_text_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, task: str, origin: str | None, expected: tuple[Any, ...]
) -> None:
    import datasets
    from huggingface_hub import ModelCard

    monkeypatch.delenv("ARA_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: [{"text": "It rained."}])
    row = {**reported.evaluation().results["tasks"]["wikitext2"]}
    row["text"] = load_documents(task, "evaluation").origin if origin is None else origin
    made = reported.evaluation()
    made = made.model_copy(update={"results": {**made.results, "tasks": {task: row}, "zero_shot": None}})
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (made,))))
    (found,) = ModelCard(card(report)).data.eval_results
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == expected


def test_names_cannot_break_a_table_or_the_front_matter() -> None:
    report = gather(sources())
    (evaluation,) = report.evaluations
    name = 'a|b <i>\n"x": [y]'
    results = tuple(result.model_copy(update={"task": name}) for result in evaluation.harness)
    changed = evaluation.model_copy(update={"harness": results})
    text = card(report.model_copy(update={"evaluations": (changed,), "title": name}))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model-index"][0]["name"] == name
    assert front["model-index"][0]["results"][-1]["dataset"]["name"] == name
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| task |"))
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines[start : start + 5]]
    assert len(set(columns)) == 1
    assert "<i>" not in "\n".join(lines[lines.index("---", 1) :])


# What ends a code span, a fence, a cell, a line; what steers; what two escapes of JSON stand for.
_WEIRD = [
    "a`b",
    "``",
    "`x",
    "a``b`",
    "a|b",
    "two\n# lines",
    "\x1b[31mred\u202e",
    "\u2028:\x85 'x'",
    "𝕏 é",
    "- &amp; ~~x~~ $y$",
]


@pytest.mark.parametrize("name", [*_WEIRD, "null", "owner/name: x", "#x", "1/2"])
def test_names_stay_in_their_code_and_in_one_yaml(name: str) -> None:
    from markdown_it import MarkdownIt

    report = gather(sources())
    base = report.base.model_copy(update={"kind": "hub", "name": name})
    ranks = report.allocation.model_copy(update={"name": name})
    kinds = tuple(kind.model_copy(update={"kind": name}) for kind in ranks.kinds)
    ranks = ranks.model_copy(update={"kinds": kinds})
    text = card(report.model_copy(update={"base": base, "allocation": ranks, "title": name}))
    replaced = dict.fromkeys(map(ord, "\x1b\u202e\u2028\x85"), "\ufffd")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == front["model-index"][0]["name"] == name.translate(replaced)
    in_line = " ".join(name.split()).translate(replaced)
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    codes = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert codes.count(in_line) >= 2 + len(kinds)
    heading = tokens[1].children
    assert heading is not None and "".join(child.content for child in heading) == in_line
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text)


def test_a_command_stays_in_its_fence() -> None:
    from markdown_it import MarkdownIt

    command = shlex.join(["ara", "eval", "--prompt", "look:\n```\n# no heading\n````\n", "--name", "\u2066x"])
    report = gather(sources())
    (first, *others) = report.work
    text = card(report.model_copy(update={"work": (first.model_copy(update={"command": command}), *others)}))
    fences = [token.content for token in MarkdownIt().parse(text.split("---\n", 2)[2]) if token.type == "fence"]
    assert any(command.replace("\u2066", "\ufffd") in content for content in fences)
