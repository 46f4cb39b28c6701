"""What somebody types or pipes as a prompt, and what is refused."""

from __future__ import annotations

import io

import pytest

from ara import prompts
from ara.config import EvalConfig, build
from ara.errors import UsageError
from ara.prompts import check_prompt, piped_prompt


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the prompt is empty"),
        (" \n\t", "the prompt is empty"),
        ("a\0b", "holds a NUL character"),
        ("caf\udce9", "is not UTF-8: character 4"),  # a byte of an argument that is not UTF-8
        ("x" * 101, "more than 100 characters"),
    ],
)
def test_prompts_that_are_none(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT", 100)
    with pytest.raises(UsageError, match=words) as caught:
        check_prompt(text)
    assert caught.value.exit_code == 2 and caught.value.hint
    with pytest.raises(UsageError):
        build(EvalConfig, prompt=text)


def test_prompts_stay_as_they_are() -> None:
    for text in ("Who are you?", " Zoë\n", "\x1b[31m"):
        assert check_prompt(text) == text == build(EvalConfig, prompt=text).prompt


def test_what_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped_prompt(io.BytesIO("Zoë\r\nsays\n".encode())) == "Zoë\nsays\n"
    with pytest.raises(UsageError, match="is not UTF-8: byte 4"):
        piped_prompt(io.BytesIO(b"caf\xe9"))
    monkeypatch.setattr(prompts, "MAX_PROMPT", 100)
    with pytest.raises(UsageError, match="more than 100 characters"):
        piped_prompt(io.BytesIO(b"x" + "€".encode() * 500))
