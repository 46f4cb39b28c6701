"""Renders conversations by a chat template in a separate process with limits; see :mod:`ara.data.chat`.

This file is started by its path and imports nothing of ara, so that it starts within a second.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from datetime import datetime
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
    from transformers.utils import chat_template_utils  # before the limits apply

    if request["day"] is not None:
        chat_template_utils.datetime = _day(*request["day"])
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


def _day(year: int, month: int, day: int) -> type[datetime]:
    """Return a class whose ``now`` is that day, for templates that print the current date."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(year, month, day, tzinfo=tz)

    return Day


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"rendered": [...]}``, or ``{"error": ..., "index": ...}`` with a line that follows "the chat template".

    A rendered conversation has its ``text`` and the places of its ``answers`` in it; see :func:`_with_answers`.

    Args:
        request: ``template``, ``special`` (tokens by name), ``bytes`` (limit), ``total`` (characters of all texts), and
            ``conversations``: each with its ``messages``, ``characters`` (limit of its text), and ``prompt`` (whether
            an answer is to follow).
    """
    import jinja2

    rendered: list[dict[str, Any]] = []
    total = 0
    try:
        for conversation in request["conversations"]:
            messages = conversation["messages"]
            if conversation["prompt"]:
                made = {"text": _text(request, conversation, messages, True), "answers": []}
            else:
                made = _with_answers(request, conversation)
            total += len(made["text"])
            if total > request["total"]:
                return _error(f"makes texts of more than {request['total']:,} characters together", rendered)
            rendered.append(made)
    except MemoryError:
        return _error(f"takes more than {request['bytes'] / 2**30:.3g} GiB of memory", rendered)
    except Refused as error:
        return _error(str(error), rendered)
    except Exception as error:
        # A template's `raise_exception` raises this class itself; a broken template raises a subclass.
        words = "refuses the prompt" if type(error) is jinja2.TemplateError else f"fails with {type(error).__name__}"
        told = " ".join(str(error).split())[:_SHOWN]
        return _error(f"{words}: {told}" if told else words, rendered)
    return {"rendered": rendered}


class Refused(Exception):
    """What the template made of a conversation cannot be used."""


def _error(words: str, rendered: list[dict[str, Any]]) -> dict[str, Any]:
    return {"error": words, "index": len(rendered)}


def _with_answers(request: dict[str, Any], conversation: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a whole conversation, and start and end of its answers in it, in characters.

    An answer starts where the text of the messages before it ends, rendered with the start of an answer. It ends where
    the text of the messages up to it ends. Some templates change earlier turns as soon as another one follows: Qwen3
    removes their reasoning. Such a turn has no place. The last message must have one if it is an answer.
    """
    messages = conversation["messages"]
    text = _text(request, conversation, messages, False)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = index == len(messages) - 1
        start = _text(request, conversation, messages[:index], True)
        end = text if last else _text(request, conversation, messages[: index + 1], False)
        if end.startswith(start) and text.startswith(end):
            answers.append([len(start), len(end)])
        elif last:
            raise Refused("does not continue the prompt when it renders the answer, so the answer cannot be located")
    return {"text": text, "answers": answers}


def _text(request: dict[str, Any], conversation: dict[str, Any], messages: list[Any], prompt: bool) -> str:
    """Return the text of ``messages``, with the start of an answer if ``prompt``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=request["template"],
        add_generation_prompt=prompt,
        **request["special"],
    )
    if len(text) > conversation["characters"]:
        raise Refused(f"makes a text of more than {conversation['characters']:,} characters")
    text.encode("utf-8")
    return str(text)


if __name__ == "__main__":
    main()
