"""Applies a model's chat template.

A template is an untrusted program that comes with the model. The sandbox of transformers protects files and modules,
but does not limit time and memory. So the template runs in a separate process with limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.data import chat_renderer
from ara.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "use --no-chat: the model then continues the plain text"
# Seconds to start Python and import transformers: usually one, more on a busy machine.
_STARTING = 60


@dataclass(frozen=True)
class Limits:
    """Limits of rendering a template. Real templates take milliseconds.

    Attributes:
        seconds: CPU time; elapsed time where the system cannot limit CPU time.
        bytes: memory.
        characters: length of the text; at least twice the prompt's. Tokenising, which has no limits, takes about 100
            bytes per character.
    """

    seconds: int = 5
    bytes: int = 2**29
    characters: int = 2**20


LIMITS = Limits()


def chat_text(tokenizer: PreTrainedTokenizerBase, text: str, limits: Limits = LIMITS) -> str:
    """Return the prompt that the chat template makes of one user message.

    The result is that of transformers' ``apply_chat_template``. It contains the special tokens: do not add them again.

    Args:
        tokenizer: with a chat template.
        text: the user's message.
        limits: of the rendering.

    Raises:
        ModelError: there is no default template, or it fails, refuses the prompt or exceeds the limits.
    """
    special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    request = {
        "template": _template(tokenizer),
        "messages": [{"role": "user", "content": text}],
        "special": special,
        "seconds": limits.seconds,
        "bytes": limits.bytes,
        "characters": max(limits.characters, 2 * len(text)),
        "path": sys.path,
    }
    answer = _ask(json.dumps(request), limits)
    if "error" in answer:
        raise ModelError(f"the chat template {answer['error']}", _HINT)
    return answer["text"]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # several by name
        names = ", ".join(sorted(map(str, tokenizer.chat_template)))
        raise ModelError(f"the model has the chat templates {names or 'of no name'}, and no default", _HINT) from None
    if not isinstance(template, str):
        raise ModelError(f"the chat template is a {type(template).__name__}, expected a text", _HINT)
    return template


def _plain(value: object) -> object:
    """Return special tokens, which tokenizers may keep as objects, as texts."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _ask(request: str, limits: Limits) -> dict[str, str]:
    """Send a request to a new renderer process; return its answer, or an error if there is none."""
    # Otherwise numpy reserves memory for every core.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", chat_renderer.__file__],
            input=request.encode("ascii"),
            capture_output=True,
            env={**os.environ, **threads},
            timeout=_STARTING + limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"was not rendered after {_STARTING + limits.seconds} s"}
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        return {"error": _death(done, limits)}
    return answer


def _death(done: subprocess.CompletedProcess[bytes], limits: Limits) -> str:
    """Return why a renderer process gave no answer."""
    import signal

    if -done.returncode == getattr(signal, "SIGALRM", None):
        return f"was stopped after {limits.seconds + chat_renderer.WAITING} s"
    # SIGXCPU at the soft limit of CPU time; SIGKILL at the hard limit, or when memory is short.
    if -done.returncode in {getattr(signal, "SIGXCPU", None), getattr(signal, "SIGKILL", None)}:
        return f"was stopped after {limits.seconds} s of computing, or because of too little memory"
    last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"was not rendered: {last[:200]}"
