"""Answers of conversations: distances against their definition, and which answers are empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ara.errors import NumericalError
from ara.evaluation.chat import answer_distances, is_silent, whole_answer
from ara.evaluation.generation import greedy_tokens
from ara.models import scores
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = torch.arange(4, 24)


def conversation(length: int, *spans: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and answers; answers are the tokens of ``spans``."""
    answers = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        answers[start:end] = True
    return torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(length)), answers


@pytest.mark.parametrize("chunk", [scores.CHUNK_BYTES, 7 * 4 * 260])
def test_distances_are_means_over_the_tokens_of_answers(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_BYTES", chunk)
    models = {"dense": tiny_model("llama"), "other": tiny_model("llama", seed=1)}
    conversations = [conversation(30, (12, 20)), conversation(41, (7, 9), (25, 41)), conversation(12, (11, 12))]
    found = answer_distances(models, conversations, "dense")
    assert list(found) == ["other"] and len(found["other"]) == 3
    for (ids, answers), (kl, same) in zip(conversations, found["other"], strict=True):
        with torch.inference_mode():
            dense, other = (model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for model in models.values())
        rows = [position - 1 for position in range(len(ids)) if answers[position]]
        expected = [float((dense[row].exp() * (dense[row] - other[row])).sum()) for row in rows]
        agreed = [int(dense[row].argmax()) == int(other[row].argmax()) for row in rows]
        assert kl == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert same == pytest.approx(sum(agreed) / len(agreed))


def test_the_first_token_is_never_predicted() -> None:
    models = {"dense": tiny_model("llama"), "other": tiny_model("llama", seed=1)}
    ids, answers = conversation(20, (5, 9))
    with_first = answers.clone()
    with_first[0] = True
    assert answer_distances(models, [(ids, answers)], "dense") == answer_distances(models, [(ids, with_first)], "dense")


@pytest.mark.parametrize("broken", ["dense", "other"])
def test_nan_names_model_and_conversation(broken: str) -> None:
    models = {"dense": tiny_model("llama"), "other": tiny_model("llama", seed=1)}

    def spoil(_model: Any, _inputs: Any, found: Any) -> None:
        if found.logits.shape[1] == 12:
            found.logits[..., 7] = float("nan")

    models[broken].register_forward_hook(spoil)
    with pytest.raises(NumericalError, match=f"Reading, {broken}, conversation 2: the model gives logits of nan"):
        answer_distances(models, [conversation(30, (12, 20)), conversation(12, (5, 8))], "dense", label="Reading")


def test_an_infinite_divergence_is_no_figure() -> None:
    models = {"dense": tiny_model("llama"), "other": tiny_model("llama", seed=1)}

    def exclude(_model: Any, _inputs: Any, found: Any) -> None:
        found.logits[..., 7] = -float("inf")

    models["other"].register_forward_hook(exclude)
    with pytest.raises(NumericalError, match="other, conversation 1: the KL divergence from dense is inf"):
        answer_distances(models, [conversation(30, (12, 20))], "dense")


def test_an_answer_that_ends_at_once_is_empty() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first, second = list(greedy_tokens(model, PROMPT, 2, set()))
    assert is_silent(model, tokenizer, PROMPT, 5, {first}, "who")
    assert not is_silent(model, tokenizer, PROMPT, 5, {second} - {first}, "who")
    assert whole_answer(model, PROMPT, 5, {first}, "who") == [first]
    assert whole_answer(model, PROMPT, 5, set(), "who") == list(greedy_tokens(model, PROMPT, 5, set()))


@pytest.mark.parametrize("blank", [" ", "\n", "<pad>"])
def test_a_blank_answer_is_empty(blank: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    token = tokenizer(blank, add_special_tokens=False)["input_ids"][-1]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    calls: list[int] = []

    def say(_model: Any, _inputs: Any, found: Any) -> None:
        calls.append(1)
        found.logits[..., letter if len(calls) == 4 else token] = 1e6

    model.register_forward_hook(say)
    assert is_silent(model, tokenizer, PROMPT, 3, set(), "who") and len(calls) == 3
    calls.clear()
    # The fourth token can be seen, and generation ends with it.
    assert not is_silent(model, tokenizer, PROMPT, 40, set(), "who") and len(calls) == 4
