"""The tiny models must be what the other tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, VOCABULARY, save_tiny, tiny_config, tiny_model, tiny_texts, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_finite_logits(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"][:23] for text in tiny_texts(3)])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    assert logits.shape == (3, 23, VOCABULARY)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1  # not flat


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_and_generates_the_same(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family, seed=3)
    assert (folder / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = tiny_model(family, seed=3)
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_on_the_seed_only(family: str) -> None:
    torch.manual_seed(1)
    first = tiny_model(family, seed=5).state_dict()
    torch.manual_seed(2)
    second = tiny_model(family, seed=5).state_dict()
    other = tiny_model(family, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_sizes_are_different_and_no_powers_of_two() -> None:
    config = tiny_config("llama")
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    sizes = [config.hidden_size, config.intermediate_size, queries, keys, config.vocab_size]
    assert len(set(sizes)) == len(sizes)
    assert all(size & (size - 1) for size in sizes)


def test_tokenizer_round_trip_and_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    text = "Grüße, 世界! It's 5 °C.\n\n"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == VOCABULARY
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: Hi\nassistant: "


def test_texts_are_many_and_the_same_each_time() -> None:
    assert len(tiny_texts()) >= 200
    assert tiny_texts() == tiny_texts()
    assert len(set(tiny_texts())) > 100
