"""Standard streams: those that were closed before the program started (``ara status >&-``), and piped input."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

from ara.errors import UsageError


def piped_input(example: str) -> BinaryIO:
    """Return the bytes of stdin; ``example`` is the hint of the error.

    Raises:
        UsageError: stdin is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("prompts are read from stdin, which is closed", example)
    return sys.stdin.buffer


def replace_closed() -> None:
    """Replace closed streams, which are ``None`` in Python.

    Otherwise the next opened file would get the stream's descriptor, and libraries would print into that file. Stdin
    becomes empty. Output to stderr is lost. Writing to stdout fails, because results must not be lost silently.
    """
    for name, mode, access in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # The lowest free descriptor is that of the stream.
            descriptor = os.open(os.devnull, access)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace"))
