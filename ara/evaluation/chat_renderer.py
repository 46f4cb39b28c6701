"""Renders one chat template, in a process of its own; see :mod:`ara.evaluation.chat`.

A template is a program that somebody else wrote: it may loop forever or fill the memory. It is run here, within limits,
by transformers' own sandbox. The file is started by its path and imports nothing of ara, so that it starts in a second.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Characters of what an error says.
_SHOWN = 200
# Seconds that a process may wait for the processor, beside those that it computes.
WAITING = 3


def main() -> None:
    """Read a request from stdin as JSON, and write the answer to stdout as JSON."""
    request = json.load(sys.stdin.buffer)
    known = set(sys.path)
    sys.path += [folder for folder in request["path"] if folder and folder not in known]
    answer = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints while it is imported is no answer
    import transformers.utils.chat_template_utils  # noqa: F401  # before the limits: it is not what they are for

    limit(request["seconds"], request["bytes"])
    answer.write(json.dumps(render(request)))
    answer.flush()


def limit(seconds: int, size: int) -> None:
    """Limit what this process may still take, where the system can.

    Args:
        seconds: of CPU time; :data:`WAITING` more of time.
        size: bytes of memory.
    """
    try:
        import resource
    except ImportError:  # Windows: the parent's patience is the only limit
        return
    wanted = {
        resource.RLIMIT_CPU: math.ceil(time.process_time()) + seconds,
        resource.RLIMIT_AS: _mapped() + size,
        resource.RLIMIT_CORE: 0,
    }
    signal.alarm(seconds + WAITING)
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, hard))
        except (OSError, ValueError):  # macOS knows no RLIMIT_AS
            continue


def _mapped() -> int:
    """Return the bytes of address space in use, where the system says so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def render(request: dict[str, Any]) -> dict[str, str]:
    """Return ``{"text": ...}``, or ``{"error": ...}`` with one line that goes on from "the chat template".

    Args:
        request: ``template``, ``messages``, ``special`` (tokens by name), ``characters`` (the most of the text).
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["special"],
        )
        if len(text) > request["characters"]:
            return {"error": f"makes a text of more than {request['characters']:,} characters"}
        text.encode("utf-8")
    except MemoryError:
        return {"error": f"takes more than {request['bytes'] / 2**30:g} GiB of memory"}
    except Exception as error:
        # `raise_exception` of a template raises this class itself, a wrong template one of its subclasses.
        words = "refuses the prompt" if type(error) is jinja2.TemplateError else f"fails with {type(error).__name__}"
        told = " ".join(str(error).split())[:_SHOWN]
        return {"error": f"{words}: {told}" if told else words}
    return {"text": text}


if __name__ == "__main__":
    main()
