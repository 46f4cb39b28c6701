"""Checks prompts before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ara.errors import UsageError

# Characters of a prompt: more than the largest context holds. A device that is read as a prompt has no end.
MAX_PROMPT = 2**24
_NO_TEXT = "give a prompt that is text in UTF-8"


def check_prompt(text: str, what: str = "the prompt") -> str:
    """Return ``text`` if it can be a prompt; ``what`` names it in errors.

    Raises:
        UsageError: it is empty, too long, or no valid text.
    """
    if not text.strip():
        raise UsageError(f"{what} is empty", "give a text, such as 'Who are you?'")
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{what} has more than {MAX_PROMPT:,} characters", f"shorten {what}")
    if "\0" in text:
        raise UsageError(f"{what} holds a NUL character and is no text", _NO_TEXT)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not UTF-8: character {error.start + 1} is invalid", _NO_TEXT) from None
    return text


def piped_prompt(stream: BinaryIO) -> str:
    """Return the prompt read from a stream.

    Raises:
        UsageError: it is not UTF-8, or see :func:`check_prompt`.
    """
    return check_prompt(_decoded(stream.read(_most_bytes() + 1)).replace("\r\n", "\n"))


def piped_lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of a stream as they come, without their ends; :func:`check_prompt` refuses one that is too long.

    Raises:
        UsageError: a line is not UTF-8.
    """
    while content := stream.readline(_most_bytes() + 1):
        yield _decoded(content).rstrip("\r\n")


def _most_bytes() -> int:
    """Return how many bytes a prompt may have; a character has at most 4."""
    return 4 * MAX_PROMPT


def _decoded(content: bytes) -> str:
    """Return the text of bytes; of more than a prompt may have only the beginning counts.

    Raises:
        UsageError: they are not UTF-8.
    """
    most = _most_bytes()
    try:
        return content[:most].decode("utf-8", "strict" if len(content) <= most else "ignore")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8: byte {error.start + 1} is invalid", _NO_TEXT) from None
