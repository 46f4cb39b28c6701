"""Conversations: what is read from where, how bad ones are refused, and which tokens are answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ara.data import chat, conversations, texts
from ara.data.chat import Limits
from ara.data.conversations import (
    Conversation,
    Message,
    conversation_tokens,
    load_conversations,
    prompt_tokens,
)
from ara.data.texts import load_documents
from ara.errors import DataError, ModelError, UsageError
from tests.tiny import tiny_tokenizer
from tests.unit.data.test_chat import CHATML, LLAMA3, LOOPS, MISTRAL

# Qwen3 removes the reasoning of earlier answers and writes an empty one before the last.
FORGETS = """\
{% for message in messages %}[{{ message.role }}]\
{% if message.role == 'assistant' and loop.last %}(thought){% endif %}{{ message.content }};{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"""
REWRITES = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
TWO_TURNS = ("ask one", "answer one", "ask two", "answer two")


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def rows(*spoken: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"messages": conversation(*contents).plain()} for contents in spoken]


def written(path: Path, found: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def with_template(template: str | None, *special: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


# -- reading ----------------------------------------------------------------------------------------------------


def test_chat_is_read_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    written(tmp_path / "instructions/calibration.jsonl", rows(("a", "b"), TWO_TURNS))
    written(tmp_path / "instructions/evaluation.jsonl", rows(("c",)))
    found = load_conversations("chat", "calibration")
    assert found.conversations == (conversation("a", "b"), conversation(*TWO_TURNS))
    assert (found.name, found.purpose) == ("chat", "calibration") and "instructions/calibration.jsonl" in found.origin
    assert load_conversations("chat", "evaluation").conversations == (conversation("c"),)


@pytest.mark.parametrize(("name", "folder"), [("chat", "instructions"), ("ultrachat", "ultrachat_200k")])
def test_a_missing_folder_names_path_and_remedy(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "_read_hub", lambda *_: pytest.fail("fell back to the hub in silence"))
    with pytest.raises(DataError, match=rf"text '{name}' \(calibration\): no file .*{folder}/") as error:
        load_conversations(name, "calibration")
    assert "ARA_DATA_DIR" in (error.value.hint or "")


@pytest.mark.parametrize("name", ["chat", "ultrachat"])
def test_without_a_folder_both_are_ultrachat_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[Any, ...]] = []

    def hub(*args: Any, **named: Any) -> list[Any]:
        calls.append((*args, named["split"], named["streaming"]))
        return [*rows(("a", "b")), {"messages": [{"role": "user", "content": " "}]}, {"messages": []}]

    monkeypatch.delenv("ARA_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = load_conversations(name, "evaluation")
    assert calls == [("HuggingFaceH4/ultrachat_200k", None, "test_sft", True)]
    assert found.conversations == (conversation("a", "b"),) and found.origin.endswith("(2 without text left out)")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("field", ["messages", "turns"])
def test_a_file_of_conversations(suffix: str, field: str, tmp_path: Path) -> None:
    table = [{"id": 1, field: row["messages"]} for row in rows(("a", "b"), TWO_TURNS)]
    path = tmp_path / f"own{suffix}"
    if suffix == ".jsonl":
        written(path, table)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(table), path)
    spec = f"chat:{path}" + ("" if field == "messages" else f"#{field}")
    found = load_conversations(spec, "calibration")
    assert found.conversations == (conversation("a", "b"), conversation(*TWO_TURNS))
    assert found.conversations[1].where.startswith(str(path)) and found.conversations[1].where.endswith(" 2")
    assert load_conversations(spec, "evaluation").digest == found.digest


def test_the_digest_covers_roles_and_limits_of_messages(tmp_path: Path) -> None:
    one = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    variants = [
        one,
        [{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}],
        [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}],
    ]
    digests = set()
    for messages in variants:
        path = written(tmp_path / "a.jsonl", [{"messages": messages}])
        digests.add(load_conversations(f"chat:{path}", "calibration").digest)
    path = written(tmp_path / "a.jsonl", [{"messages": one[:1]}, {"messages": one[1:]}])
    digests.add(load_conversations(f"chat:{path}", "calibration").digest)
    assert len(digests) == 4


USER = '{"role": "user", "content": "x"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: got a list, expected an object with a list 'messages'"),
        ('{"text": "x"}', r"line 2: got an object with text, expected an object with a list 'messages'"),
        ('{"messages": "x"}', r"line 2: messages are a str, expected a list"),
        ('{"messages": []}', r"line 2: the conversation has no messages"),
        ('{"messages": ["x"]}', r"line 2: message 1 is 'x', expected an object with the texts role and content"),
        (f'{{"messages": [{USER}, {{"from": "gpt", "value": "y"}}]}}', r"message 2 is an object with from, value"),
        (
            f'{{"messages": [{USER}, {{"role": "user", "content": null}}]}}',
            r"message 2 is an object with role, content",
        ),
        (f'{{"messages": [{USER}, {{"role": "assistant", "content": " "}}]}}', r"message 2 has an empty content"),
        ('{"messages": [{"role": "", "content": "x"}]}', r"message 1 has an empty role"),
    ],
)
def test_a_bad_conversation_names_line_and_shape(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"messages": [{USER}]}}\n{line}\n')
    with pytest.raises(DataError, match=words) as error:
        load_conversations(f"chat:{path}", "calibration")
    assert str(path) in str(error.value) and error.value.hint and "\n" not in str(error.value)


def test_a_file_without_conversations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        load_conversations(f"chat:{tmp_path / 'empty.jsonl'}", "calibration")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="plain text according to its name, expected JSON lines or Parquet"):
        load_conversations(f"chat:{tmp_path / 'a.txt'}", "calibration")
    parquet.write_table(pyarrow.table({"messages": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'messages' holds string, expected lists"):
        load_conversations(f"chat:{tmp_path / 'a.parquet'}", "calibration")


def test_plain_texts_and_conversations_are_not_mixed_up(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", rows(("a", "b")))
    for name in ("chat", "ultrachat", f"chat:{path}"):
        with pytest.raises(UsageError, match="holds conversations, expected plain text"):
            load_documents(name, "evaluation")
    with pytest.raises(UsageError, match="'c4' holds no conversations"):
        load_conversations("c4", "evaluation")


# -- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answered"),
    [
        (tiny_tokenizer().chat_template, ["answer one\n", "answer two\n"]),
        (LLAMA3, ["answer one<|eot_id|>", "answer two<|eot_id|>"]),
        (CHATML, ["answer one<|im_end|>", "answer two<|im_end|>"]),  # without the line feed after the special token
        (MISTRAL, [" answer one<eos>", " answer two<eos>"]),
        (FORGETS, ["(thought)answer two;"]),
    ],
)
def test_answers_are_marked_with_the_end_of_their_turn(here: None, template: str, answered: list[str]) -> None:
    tokenizer = with_template(template, "<|im_end|>")
    (found,) = conversation_tokens(tokenizer, [conversation(*TWO_TURNS)])
    plain = conversation(*TWO_TURNS).plain()
    expected = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    if template != LLAMA3:  # which prints the date
        assert found.ids.tolist() == expected
    assert found.ids.dtype == torch.int64 and found.answers.dtype == torch.bool
    assert tokenizer.decode(found.ids[found.answers]) == "".join(answered)
    runs = int((found.answers[1:] & ~found.answers[:-1]).sum())
    assert runs == len(answered) and not found.answers[0]


def test_a_token_across_the_start_of_an_answer_belongs_to_it(here: None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["a", "b", ":", ":b", "?"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("?", "isolated")
    template = "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else '?' }}{% endfor %}"
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    (found,) = conversation_tokens(tokenizer, [conversation("a", "b")])
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["a", ":b", "?"]
    assert found.answers.tolist() == [False, True, True]


def test_a_conversation_without_answer_has_none_marked(here: None) -> None:
    tokenizer = with_template(CHATML)
    (found,) = conversation_tokens(tokenizer, [conversation("only a question")])
    assert len(found.ids) and not found.answers.any()


def test_the_prompt_leaves_the_last_answer_out(here: None) -> None:
    tokenizer = with_template(CHATML)
    whole, asked = prompt_tokens(tokenizer, [conversation(*TWO_TURNS), conversation(*TWO_TURNS[:3])])
    assert torch.equal(whole, asked)
    messages = conversation(*TWO_TURNS[:3]).plain()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(whole) == text


def test_a_template_that_rewrites_the_prompt_is_refused(here: None) -> None:
    with pytest.raises(ModelError, match=r"a.jsonl, line 7: the chat template does not continue the prompt") as error:
        conversation_tokens(with_template(REWRITES), [Conversation(conversation("a", "b").messages, "a.jsonl, line 7")])
    assert error.value.hint


def test_the_refused_conversation_is_named(here: None) -> None:
    both_ask = Conversation((Message("user", "a"), Message("user", "b")), "a.jsonl, line 2")
    with pytest.raises(ModelError, match=r"a.jsonl, line 2: the chat template refuses the prompt: Roles must"):
        conversation_tokens(with_template(MISTRAL), [conversation("a", "b"), both_ask])


def test_a_model_without_template_is_refused() -> None:
    with pytest.raises(DataError, match="the model has no chat template") as error:
        conversation_tokens(with_template(None), [conversation("a", "b")])
    assert "c4" in (error.value.hint or "")


# -- the renderer process ---------------------------------------------------------------------------------------


def test_many_conversations_are_rendered_in_a_few_processes_on_a_fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    ask = chat._ask
    monkeypatch.setattr(chat, "_ask", lambda *args: started.append(1) or ask(*args))
    monkeypatch.setattr(conversations, "_BATCH", 200)
    many = [conversation(f"question {number}", f"answer {number}") for number in range(300)]
    found = conversation_tokens(with_template(LLAMA3), many)
    assert len(started) == 2 and len(found) == 300
    text = with_template(LLAMA3).decode(found[299].ids)
    assert "Today: January 2025" in text and "question 299" in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit less")
def test_a_template_without_end_is_stopped() -> None:
    with pytest.raises(ModelError, match=r"the chat template was stopped after \d+ s"):
        conversation_tokens(with_template(LOOPS), [conversation("a", "b")], Limits(seconds=1))


def test_texts_that_would_fill_the_memory_are_refused(here: None) -> None:
    with pytest.raises(ModelError, match=r"makes texts of more than .* characters together"):
        conversation_tokens(with_template(f"{{{{ 'x' * {2**19} }}}}"), [conversation("a")] * 5)
    with pytest.raises(ModelError, match="makes a text of more than 1,048,576 characters"):
        conversation_tokens(with_template("{{ 'x' * 10**7 }}"), [conversation("a")])
