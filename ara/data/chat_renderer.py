"""Renders one chat template in a separate process with limits; see :mod:`ara.data.chat`.

This file is started by its path and imports nothing of ara, so that it starts within a second.
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

# Characters of an error's text.
_SHOWN = 200
# Seconds that the process may wait for the processor, in addition to its CPU time.
WAITING = 3


def main() -> None:
    """Read a JSON request from stdin and write the JSON answer to stdout."""
    request = json.load(sys.stdin.buffer)
    known = set(sys.path)
    sys.path += [folder for folder in request["path"] if folder and folder not in known]
    answer = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # libraries may print while they are imported
    import transformers.utils.chat_template_utils  # noqa: F401  # before the limits apply

    limit(request["seconds"], request["bytes"])
    answer.write(json.dumps(render(request)))
    answer.flush()


def limit(seconds: int, size: int) -> None:
    """Limit the further use of CPU time and memory by this process, where the system can.

    Args:
        seconds: CPU time; the elapsed time may be :data:`WAITING` longer.
        size: memory in bytes.
    """
    try:
        import resource
    except ImportError:  # Windows: only the parent's timeout applies
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
    """Return the bytes of address space in use, or 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def render(request: dict[str, Any]) -> dict[str, str]:
    """Return ``{"text": ...}``, or ``{"error": ...}`` with a line that follows "the chat template".

    Args:
        request: ``template``, ``messages``, ``special`` (tokens by name), ``characters`` (limit), ``bytes`` (limit).
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
        # A template's `raise_exception` raises this class itself; a broken template raises a subclass.
        words = "refuses the prompt" if type(error) is jinja2.TemplateError else f"fails with {type(error).__name__}"
        told = " ".join(str(error).split())[:_SHOWN]
        return {"error": f"{words}: {told}" if told else words}
    return {"text": text}


if __name__ == "__main__":
    main()
