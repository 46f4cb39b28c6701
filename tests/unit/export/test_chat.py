"""A conversation: what the model is shown of it, what is forgotten, and what is not remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ara.config import ChatConfig
from ara.errors import ModelError, UsageError
from ara.progress import SilentReporter
from ara.stages.common import Run
from export.answering import Answerer
from export.chat import Chat

pytestmark = pytest.mark.usefixtures("here")
NEW = 12


class Heard(SilentReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def made(checkpoint: Callable[..., Any]) -> Any:
    """A checkpoint of 200 positions; a character is a token."""
    return checkpoint("llama")


def start(folder: Path, heard: Heard | None = None, **settings: Any) -> Chat:
    config = ChatConfig(**{"max_new_tokens": NEW, "device": "cpu", "dtype": "float32", **settings})
    run = Run(folder, report=heard or Heard())
    return Chat(Answerer(config, run, source=folder), run.report)


def say(chat: Chat, prompt: str) -> str:
    answer = chat.answer(prompt)
    text = "".join(answer)
    chat.keep(prompt, answer)
    return text


def encoded(made: Any, said: Sequence[str], system: str | None = None) -> torch.Tensor:
    """Return transformers' tokens (1, t) of a conversation: user, assistant, user, ..."""
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def expected(made: Any, *said: str, system: str | None = None) -> str:
    """Return transformers' answer to a conversation."""
    ids = encoded(made, said, system)
    found = made.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return str(AutoTokenizer.from_pretrained(made.folder).decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_an_answer_depends_on_all_that_was_said(made: Any) -> None:
    chat = start(made.folder)
    first = say(chat, "hello")
    assert first == expected(made, "hello") != ""
    second = say(chat, "again")
    assert second == expected(made, "hello", first, "again") != expected(made, "again")
    chat.clear()
    assert say(chat, "again") == expected(made, "again")


def test_the_system_prompt_stays_ahead(made: Any) -> None:
    chat = start(made.folder, system="be brief")
    first = say(chat, "hello")
    assert first == expected(made, "hello", system="be brief") != expected(made, "hello")
    assert say(chat, "again") == expected(made, "hello", first, "again", system="be brief")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(made: Any) -> None:
    """No more of them than necessary, and for good."""
    heard = Heard()
    chat = start(made.folder, heard)
    said: list[str] = []
    counts = []
    for prompt in ("one", "two", "three", "four " * 6, "five", "six " * 26):
        rests = [[*said[2 * left :], prompt] for left in range(len(said) // 2 + 1)]
        forgotten = next(left for left, rest in enumerate(rests) if len(encoded(made, rest)[0]) + NEW <= 200)
        before = len(heard.warnings)
        found = say(chat, prompt)
        assert found == expected(made, *rests[forgotten])
        said = [*rests[forgotten], found]
        assert [text for turn in chat.turns for text in (turn.prompt, turn.answer)] == said
        turns = "the oldest turn is" if forgotten == 1 else f"the {forgotten} oldest turns are"
        assert heard.warnings[before:] == (
            [f"the context of the model is full: {turns} forgotten"] if forgotten else []
        )
        counts.append(forgotten)
    assert 1 in counts and max(counts) > 1


def test_a_prompt_that_fits_in_no_way_takes_nothing_with_it(made: Any) -> None:
    heard = Heard()
    chat = start(made.folder, heard)
    first = say(chat, "hello")
    with pytest.raises(UsageError, match=r"tokens of prompt and 12 new ones are more than the 200 positions"):
        chat.answer("x" * 200)
    with pytest.raises(UsageError, match="the prompt holds a NUL character"):
        chat.answer("a\0b")
    assert heard.warnings == [] and say(chat, "again") == expected(made, "hello", first, "again")


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came(made: Any) -> None:
    chat = start(made.folder)
    answer = chat.answer("hello")
    pieces = iter(answer)
    begun = next(pieces) + next(pieces)
    del pieces
    chat.keep("hello", answer)
    assert say(chat, "again") == expected(made, "hello", begun, "again")


def test_an_empty_answer_is_not_remembered(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    chat = start(made.folder, heard)
    with monkeypatch.context() as patch:
        patch.setattr(chat._model._decoder, "_stop", set(range(made.model.config.vocab_size)))
        assert say(chat, "hello") == ""
    assert heard.warnings[0].startswith("the answer is empty: the model ended its turn with the first token")
    assert chat.turns == [] and say(chat, "again") == expected(made, "again")


def test_a_cleared_chat_draws_as_a_new_one(made: Any) -> None:
    chat = start(made.folder, temperature=1.5, seed=5)
    first = [say(chat, "hello"), say(chat, "hello")]
    chat.clear()
    assert [say(chat, "hello"), say(chat, "hello")] == first
    assert say(start(made.folder, temperature=1.5, seed=6), "hello") != first[0]


def test_a_template_is_tried_before_the_weights_are_read(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.torch_decoder.load", lambda *_: pytest.fail("the weights were read"))
    with monkeypatch.context() as patch:
        patch.setattr("ara.data.chat.default_template", lambda *_: "{{ messages[-1].content }}")
        with pytest.raises(ModelError, match="the chat template leaves the system prompt out"):
            start(made.folder, system="be brief")
    monkeypatch.setattr("export.chat.has_template", lambda _: False)
    with pytest.raises(UsageError, match="no chat template, which a chat needs") as caught:
        start(made.folder)
    assert caught.value.hint is not None and "ara generate" in caught.value.hint
