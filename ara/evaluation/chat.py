"""The one place where a model's chat template is applied.

A template comes with the model, so it is somebody else's program. transformers runs it in a sandbox that keeps it from
files and modules, but not from looping or from filling the memory: so it runs in a process of its own, within limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.errors import ModelError
from ara.evaluation import chat_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "use --no-chat: the model then continues the plain text"
# Seconds to start Python and import transformers: one, or much more on a loaded machine.
_PATIENCE = 60


@dataclass(frozen=True)
class Limits:
    """What rendering a template may take. Real ones take milliseconds.

    Attributes:
        seconds: of CPU time; where the system cannot limit that, of time.
        bytes: of memory.
        characters: of the text, or twice the prompt's if that is more. The text is tokenised outside of these limits,
            which takes a hundred bytes for each.
    """

    seconds: int = 5
    bytes: int = 2**29
    characters: int = 2**20


LIMITS = Limits()


def chat_text(tokenizer: PreTrainedTokenizerBase, text: str, limits: Limits = LIMITS) -> str:
    """Return the prompt that a model's chat template makes of ``text`` as the only message, of the user.

    It is what ``apply_chat_template`` of transformers returns. Special tokens are in it: do not add them once more.

    Args:
        tokenizer: with a chat template.
        text: what the user says.
        limits: of the rendering.

    Raises:
        ModelError: there is no default template, it fails or refuses the prompt, or goes beyond the limits.
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
    """Return special tokens as texts: tokenizers may keep them as objects."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _ask(request: str, limits: Limits) -> dict[str, str]:
    """Send a request to a renderer and return its answer, or an error if it did not survive."""
    # Numpy would reserve memory for every core.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", chat_renderer.__file__],
            input=request.encode("ascii"),
            capture_output=True,
            env={**os.environ, **threads},
            timeout=_PATIENCE + limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"was not rendered after {_PATIENCE + limits.seconds} s"}
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        return {"error": _death(done, limits)}
    return answer


def _death(done: subprocess.CompletedProcess[bytes], limits: Limits) -> str:
    """Return why a renderer gave no answer."""
    import signal

    if -done.returncode == getattr(signal, "SIGALRM", None):
        return f"was stopped after {limits.seconds + chat_renderer.WAITING} s"
    # Past its soft limit a process gets SIGXCPU; past the hard one it is killed.
    if -done.returncode in {getattr(signal, "SIGXCPU", None), getattr(signal, "SIGKILL", None)}:
        return f"was stopped after {limits.seconds} s of computing, or for want of memory"
    last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"was not rendered: {last[:200]}"
