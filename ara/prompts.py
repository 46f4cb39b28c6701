"""Checks prompts before a model is loaded."""

from __future__ import annotations

from typing import BinaryIO

from ara.errors import UsageError

# Characters of a prompt: more than the largest context holds. A device that is read as a prompt has no end.
MAX_PROMPT = 2**24
_NO_TEXT = "give a prompt that is text in UTF-8"


def check_prompt(text: str) -> str:
    """Return ``text`` if it can be a prompt.

    Raises:
        UsageError: it is empty, too long, or no valid text.
    """
    if not text.strip():
        raise UsageError("the prompt is empty", "give a text, such as 'Who are you?'")
    if len(text) > MAX_PROMPT:
        raise UsageError(f"the prompt has more than {MAX_PROMPT:,} characters", "shorten the prompt")
    if "\0" in text:
        raise UsageError("the prompt holds a NUL character and is no text", _NO_TEXT)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8: character {error.start + 1} is invalid", _NO_TEXT) from None
    return text


def piped_prompt(stream: BinaryIO) -> str:
    """Return the prompt read from a stream.

    Raises:
        UsageError: it is not UTF-8, or see :func:`check_prompt`.
    """
    limit = 4 * MAX_PROMPT  # bytes; a character has at most 4
    content = stream.read(limit + 1)
    try:
        text = content[:limit].decode("utf-8", "strict" if len(content) <= limit else "ignore")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8: byte {error.start + 1} is invalid", _NO_TEXT) from None
    return check_prompt(text.replace("\r\n", "\n"))
