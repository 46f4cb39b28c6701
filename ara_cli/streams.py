"""Standard streams that were closed before the program began: ``ara status >&-``."""

from __future__ import annotations

import os
import sys


def replace_closed() -> None:
    """Put something in the place of closed streams, for Python has ``None`` there.

    Without it the next file that is opened would get the number of the closed stream, and everything that a library
    prints would end up in it. An empty input stands in for stdin. What goes to stderr is lost. Writing to stdout fails,
    as it does when the reader of a pipe has gone: results are what a command is for.
    """
    for name, mode, access in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # The lowest free number: that of the stream.
            descriptor = os.open(os.devnull, access)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace"))
