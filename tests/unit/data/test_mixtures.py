"""Calibration texts: what a spec names, and how bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.data.conversations import Conversations
from ara.data.mixtures import (
    DEFAULT_CHAT_SHARE,
    default_text,
    lacks_chat,
    load_calibration_text,
    mixture_spec,
    parse_mixture,
    resolved_text,
)
from ara.data.texts import Documents, load_documents
from ara.errors import DataError, UsageError
from tests.tiny import tiny_texts, tiny_tokenizer
from tests.unit.data.test_conversations import rows, written


def parsed(spec: str) -> dict[str, float]:
    return {one.name: one.share for one in parse_mixture(spec)}


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("c4", {"c4": 1}),
        ("c4:0.25", {"c4": 1}),
        ("c4,chat", {"c4": 0.5, "chat": 0.5}),
        (" c4 , wikitext2,", {"c4": 0.5, "wikitext2": 0.5}),
        ("c4:0.7,wikitext2:0.3", {"c4": 0.7, "wikitext2": 0.3}),
        ("chat:0.2,c4:0.8", {"chat": 0.2, "c4": 0.8}),
        ("c4:1,ultrachat:1,python-docs:.5", {"c4": 0.4, "ultrachat": 0.4, "python-docs": 0.2}),
    ],
)
def test_names_and_shares(spec: str, shares: dict[str, float]) -> None:
    assert parsed(spec) == pytest.approx(shares)
    assert list(parsed(spec)) == list(shares)


@pytest.mark.parametrize(
    "name", ["a.txt", "a, b.txt", "a:0.5", "a,b:0.5", "a.jsonl#x", "a, b.jsonl#x", "0.5", "a, c4:0.5"]
)
@pytest.mark.parametrize("prefix", ["file", "chat"])
def test_paths_with_commas_and_colons(name: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name.partition("#")[0]).write_text("x")
    spec = f"{prefix}:{tmp_path / name}"
    assert parsed(spec) == {spec: 1}
    assert parsed(f"c4,{spec},wikitext2") == pytest.approx({"c4": 1 / 3, spec: 1 / 3, "wikitext2": 1 / 3})
    assert parsed(f"{spec}:0.25,c4:0.75") == {spec: 0.25, "c4": 0.75}
    monkeypatch.chdir(tmp_path)
    if (prefix, name) != ("chat", "0.5"):  # a share: such a file is chat:./0.5
        assert parsed(f"{prefix}:{name}:0.25,c4:0.75") == {f"{prefix}:{name}": 0.25, "c4": 0.75}


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("", UsageError, r"calibration text '' names no text"),
        (" , ", UsageError, r"names no text"),
        ("c5", UsageError, r"unknown text 'c5': did you mean c4\?"),
        ("c4:0.5,wikitext:0.5", UsageError, r"unknown text 'wikitext': did you mean wikitext2"),
        ("c4:0.5,chta:0.5", UsageError, r"unknown text 'chta': did you mean chat"),
        ("c4:0.7,wikitext2", UsageError, r"wikitext2 without a share, others with one"),
        ("c4:0,chat:1", UsageError, r"the share of c4 is 0, expected a number above 0, at most 1"),
        ("c4:70,chat:30", UsageError, r"the share of c4 is 70, expected"),
        ("c4:nan", UsageError, r"the share of c4 is nan"),
        ("c4:-0.5", UsageError, r"the share of c4 is -0.5"),
        ("c4,chat,c4", UsageError, r"names c4 twice"),
        ("c4:0.5,c4:0.5", UsageError, r"names c4 twice"),
        ("c4,file:", UsageError, r"text 'file:' names no file"),
        ("c4,chat:", UsageError, r"text 'chat:' names no file"),
        ("c4,file:/nowhere/a.txt", DataError, r"/nowhere/a.txt does not exist"),
        ("c4:0.5,chat:/nowhere/a.jsonl:0.5", DataError, r"/nowhere/a.jsonl does not exist"),
    ],
)
def test_a_bad_spec_is_one_line(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse_mixture(spec)
    assert "\n" not in str(caught.value) and getattr(caught.value, "hint", None)


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_a_stored_spec_keeps_its_meaning(count: int, tmp_path: Path) -> None:
    names = [f"file:{tmp_path / f'{index}.txt'}" for index in range(count)]
    for name in names:
        Path(name.removeprefix("file:")).write_text("x")
    for spec in (",".join(names), ",".join(f"{name}:0.{index + 1}77" for index, name in enumerate(names))):
        stored = mixture_spec(parse_mixture(spec))
        again = mixture_spec(parse_mixture(stored))
        assert again == stored and parse_mixture(again) == parse_mixture(stored)
        assert [one.share for one in parse_mixture(stored)] == pytest.approx(
            [one.share for one in parse_mixture(spec)], abs=1e-6
        )


def test_the_default_has_a_share_of_chat_for_models_with_a_chat_template() -> None:
    tokenizer: Any = tiny_tokenizer()
    assert parsed(default_text(tokenizer)) == {"c4": 1 - DEFAULT_CHAT_SHARE, "chat": DEFAULT_CHAT_SHARE}
    assert resolved_text(None, tokenizer) == default_text(tokenizer) and resolved_text("c4:1", tokenizer) == "c4"
    assert lacks_chat("c4,wikitext2", tokenizer)
    assert not any(lacks_chat(spec, tokenizer) for spec in ("chat", "c4,ultrachat", default_text(tokenizer)))
    tokenizer.chat_template = None
    assert default_text(tokenizer) == "c4" and not lacks_chat("c4", tokenizer)


def test_a_mixture_is_loaded(tmp_path: Path) -> None:
    story = tmp_path / "story.jsonl"
    story.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(9)))
    spoken = written(tmp_path / "spoken.jsonl", rows(("a", "b")))
    found = load_calibration_text(f"file:{story}:0.6,chat:{spoken}:0.2")
    assert found.spec == f"file:{story}:0.75,chat:{spoken}:0.25"
    plain, chat = found.parts
    assert isinstance(plain.text, Documents) and plain.text == load_documents(f"file:{story}", "calibration")
    assert isinstance(chat.text, Conversations) and (plain.share, chat.share) == (0.75, 0.25)
    assert found.origin == f"75 % file {story.resolve()}; 25 % file {spoken.resolve()}"
    others = [f"file:{story}:0.7,chat:{spoken}:0.3", f"chat:{spoken}:0.25,file:{story}:0.75"]
    assert len({found.digest, *(load_calibration_text(spec).digest for spec in others)}) == 3


def test_a_single_text_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    spec = f"file:{tmp_path / 'a.txt'}"
    alone = load_documents(spec, "calibration")
    for one in (spec, f"{spec}:0.5"):
        found = load_calibration_text(one)
        assert (found.spec, found.digest, found.origin) == (spec, alone.digest, alone.origin)
