"""A tokenizer whose settings have wrong types is refused where it is loaded, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.errors import ModelError
from ara.models.checkpoint import load_tokenizer
from ara.models.sources import resolve
from ara.models.tokenizer_check import check_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_max_length": "256"}, "its model_max_length is '256', expected a number"),
        ({"model_max_length": [256]}, r"its model_max_length is \[256\], expected a number"),
        ({"model_max_length": True}, "its model_max_length is True, expected a number"),
    ],
)
def test_settings_of_other_types(folder: Path, changes: dict[str, Any], words: str) -> None:
    path = folder / "tokenizer_config.json"
    valid = path.read_text()
    path.write_text(json.dumps({**json.loads(valid), **changes}))
    try:
        for load in (lambda: load_tokenizer(folder), resolve(str(folder)).load_tokenizer):
            with pytest.raises(ModelError, match=f"the tokenizer of .*tiny cannot be loaded: {words}") as caught:
                load()
            assert "\n" not in str(caught.value)
    finally:
        path.write_text(valid)


def test_ids_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizer(tokenizer)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"cannot tokenise a short text .TypeError"):
        patched.setattr(tokenizer, "model_input_names", None)
        check_tokenizer(tokenizer)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_args, **_named: [])
    with pytest.raises(ValueError, match="cannot encode and decode a short text"):
        check_tokenizer(tokenizer)
    monkeypatch.setattr(type(tokenizer), "convert_tokens_to_ids", lambda *_args: "1")
    with pytest.raises(ValueError, match=r"its bos_token has the id '1', expected a number"):
        check_tokenizer(tokenizer)
