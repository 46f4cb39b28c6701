"""Greedy tokens and the text that they are shown as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ara.data.chat import message
from ara.errors import DataError, ModelError, NumericalError
from ara.evaluation.generation import (
    chat_ids,
    greedy_batch,
    greedy_continuation,
    greedy_tokens,
    next_tokens,
    prompt_ids,
    stop_tokens,
    text_pieces,
    why_empty,
)
from ara.evaluation.sampling import Sampler
from tests.tiny import tiny_model, tiny_tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer that decodes as Llama 2's does: a space in front of words, dropped at the beginning."""
    words = ["<s>", "</s>", "▁the", "▁river", "▁runs", "s", "<0xC3>", "<0xA9>", "▁caf", "<0xE2>", "<0x82>", "<0xAC>"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "tokens",
    [[2, 3, 4], [2, 3, 5, 4], [8, 6, 7, 2, 3], [2, 9, 10, 11, 4], [0, 2, 3, 1], [3], [], [2, 6], [6, 7, 9, 10, 11]],
)
def test_pieces_together_are_the_text(tokens: list[int]) -> None:
    tokenizer = sentencepiece_like()
    pieces = list(text_pieces(tokenizer, iter(tokens)))
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert all(pieces) and all("\ufffd" not in piece for piece in pieces[:-1])


def test_words_come_as_soon_as_they_are_whole() -> None:
    tokenizer = sentencepiece_like()
    assert list(text_pieces(tokenizer, iter([2, 3, 8, 6, 7, 4]))) == ["the", " river", " caf", "é", " runs"]


def test_bytes_come_whole() -> None:
    tokenizer = tiny_tokenizer()
    text = "Zoë paid 5 € – naïve?"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(text_pieces(tokenizer, iter(tokens))) == text


def test_a_prompt_with_a_token_that_the_model_has_no_row_for() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[PAD2]"], special_tokens=True)
    with pytest.raises(DataError, match=r"the prompt of mine holds the token '\[PAD2\]' \(id 260\)"):
        greedy_continuation(tiny_model("llama"), tokenizer, "Hello [PAD2]", 3, "mine")


def test_greedy_tokens_are_those_of_transformers() -> None:
    model = tiny_model("llama")
    prompt = torch.arange(4, 24)
    expected = model.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = list(greedy_tokens(model, prompt, 30, set()))
    assert found == expected[0, 20:].tolist()
    assert list(greedy_tokens(model, prompt, 30, {found[3]})) == found[: found.index(found[3])]


def test_a_batch_continues_every_row_as_if_alone() -> None:
    model = tiny_model("llama")
    prompts = torch.stack([torch.arange(4, 24), torch.arange(60, 80), torch.arange(24, 4, -1), torch.arange(100, 120)])
    whole = [list(greedy_tokens(model, prompt, 30, set())) for prompt in prompts]
    assert greedy_batch(model, prompts, 30, set()) == whole
    # One row ends at once, another one later, others never.
    stop = {whole[0][0], whole[1][5]}
    found = greedy_batch(model, prompts, 30, stop)
    assert found == [list(greedy_tokens(model, prompt, 30, stop)) for prompt in prompts]
    assert found[0] == [] and len({len(row) for row in found}) > 1


def test_a_batch_stops_when_all_rows_have_ended() -> None:
    model, calls = tiny_model("llama"), []
    prompts = torch.stack([torch.arange(4, 24), torch.arange(60, 80)])
    first = [next(greedy_tokens(model, prompt, 1, set())) for prompt in prompts]
    model.register_forward_hook(lambda *_: calls.append(1))
    assert greedy_batch(model, prompts, 30, set(first)) == [[], []]
    assert len(calls) == 1


def test_a_sampler_chooses_the_tokens() -> None:
    model, prompt = tiny_model("llama"), torch.arange(4, 24)
    texts = [list(next_tokens(model, prompt, 30, set(), Sampler(1.0, 0.9, seed))) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != (greedy := list(greedy_tokens(model, prompt, 30, set())))
    assert list(next_tokens(model, prompt, 30, set(), Sampler(1e-9, 1.0, 0))) == greedy
    assert (
        list(next_tokens(model, prompt, 30, {texts[0][4]}, Sampler(1.0, 0.9, 3)))
        == texts[0][: texts[0].index(texts[0][4])]
    )


# Families that remember in another way than by past_key_values, or not at all.
OTHER_CACHES: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": 60, "n_layer": 2, "n_head": 6, "n_positions": 90},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 12, "num_heads": 10, "head_dim": 12, "n_groups": 2, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 60},
    "recurrent_gemma": {"lru_width": 60, "attention_window_size": 32, "head_dim": 10, "num_attention_heads": 6},
}


@pytest.mark.parametrize("family", OTHER_CACHES)
def test_greedy_tokens_without_a_cache_of_the_usual_kind(family: str) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 60, "intermediate_size": 92, "num_hidden_layers": 3}
    sizes["tie_word_embeddings"] = False  # tied ones repeat the last token
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **OTHER_CACHES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # small weights give the same token always
        parameter.data += 0.1 * torch.randn_like(parameter)
    text = torch.arange(4, 24)[None]
    found = list(greedy_tokens(model, text[0], 12, set()))
    with torch.inference_mode():
        assert greedy_batch(model, text.repeat(2, 1), 12, set()) == [found, found]
        for token in found:
            assert token == int(model(input_ids=text, use_cache=False).logits[0, -1].argmax())
            text = torch.cat([text, torch.tensor([[token]])], 1)
    assert len(found) == 12 and len(set(found)) > 1


def test_what_ends_a_text() -> None:
    model = tiny_model("llama")
    assert stop_tokens(model) == {2}
    model.generation_config.eos_token_id = [2, 7]
    assert stop_tokens(model) == {2, 7}
    model.generation_config.eos_token_id = None
    assert stop_tokens(model) == set()


@pytest.mark.parametrize("eos", [{"a": 1}, "</s>", [1, "x"], [[1]], True, -1, 2.5])
def test_what_cannot_end_a_text(eos: Any) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = eos
    with pytest.raises(ModelError, match=r"eos_token_id of the model is .*, expected tokens or none"):
        stop_tokens(model)


def test_conversations_go_into_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    assert prompt_ids(tokenizer, "hi").tolist() == tokenizer("hi")["input_ids"]
    messages = [message("user", "hi"), message("assistant", "ho"), message("user", "hey")]
    found = chat_ids(tokenizer, messages)
    assert tokenizer.decode(found).endswith("user: hi\nassistant: ho\nuser: hey\nassistant: ")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found.tolist() == expected


def test_a_prompt_without_tokens_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ModelError, match="makes no token of the prompt"):
        prompt_ids(tokenizer, "")


def test_a_generation_config_makes_no_other_continuation() -> None:
    """Beams and penalties are none of a greedy text, and settings of wrong types no traceback."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = greedy_continuation(model, tokenizer, "Once", 6)
    tokens = list(greedy_tokens(model, prompt_ids(tokenizer, "Once"), 6, stop_tokens(model)))
    assert plain == tokenizer.decode(tokens, skip_special_tokens=True) and plain
    model.generation_config.num_beams, model.generation_config.repetition_penalty = 3, 1.9
    model.generation_config.min_length = "x"
    assert greedy_continuation(model, tokenizer, "Once", 6) == plain


def _set(found: Any, value: float) -> None:
    found.logits[..., 7] = value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_text_is_no_text_when_the_model_gives_nan(bad: float) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.register_forward_hook(lambda _model, _inputs, found: _set(found, bad))
    with pytest.raises(NumericalError, match=f"uniform after “Once”: the model gives logits of {bad}"):
        greedy_continuation(model, tokenizer, "Once", 4, "uniform after “Once”")
    with pytest.raises(NumericalError, match=f"the model gives logits of {bad}"):
        list(greedy_tokens(model, torch.arange(4, 9), 4, set()))
    with pytest.raises(NumericalError, match=f"mine: the model gives logits of {bad}"):
        greedy_batch(model, torch.arange(4, 14).view(2, 5), 4, set(), "mine")


def test_why_an_answer_is_empty() -> None:
    assert why_empty(3, " a\n") is None
    assert why_empty(0, "") == "the model ended its turn with the first token"
    assert why_empty(1, "\n") == "it consists of 1 token of white space or control"
    assert why_empty(40, "") == "it consists of 40 tokens of white space or control"


def test_excluded_tokens_are_no_error() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.register_forward_hook(lambda _model, _inputs, found: _set(found, -float("inf")))
    assert len(list(greedy_tokens(model, torch.arange(4, 9), 4, set()))) == 4
    assert isinstance(greedy_continuation(model, tokenizer, "Once", 4), str)
