"""Prompts that somebody typed or piped: what is refused before any model is looked at."""

from __future__ import annotations

from typing import BinaryIO

from ara.errors import UsageError

# Characters of a prompt. More than the largest context holds; a device that is read as a prompt has no end.
MAX_PROMPT = 2**24
_NO_TEXT = "the prompt is a text in UTF-8: give another one"


def check_prompt(text: str) -> str:
    """Return a prompt that somebody typed or piped.

    Raises:
        UsageError: it is empty, far too long, or no text.
    """
    if not text.strip():
        raise UsageError("the prompt is empty", "say something, such as 'Who are you?'")
    if len(text) > MAX_PROMPT:
        raise UsageError(f"the prompt has more than {MAX_PROMPT:,} characters", "shorten the prompt")
    if "\0" in text:
        raise UsageError("the prompt holds a NUL character, so it is no text", _NO_TEXT)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8: character {error.start + 1} is none", _NO_TEXT) from None
    return text


def piped_prompt(stream: BinaryIO) -> str:
    """Return the prompt that comes from a stream.

    Raises:
        UsageError: it is not UTF-8, or see :func:`check_prompt`.
    """
    limit = 4 * MAX_PROMPT  # bytes; no character has more than 4
    content = stream.read(limit + 1)
    try:
        text = content[:limit].decode("utf-8", "strict" if len(content) <= limit else "ignore")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8: byte {error.start + 1} fits no character", _NO_TEXT) from None
    return check_prompt(text.replace("\r\n", "\n"))
