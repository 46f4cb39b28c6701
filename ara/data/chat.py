"""Applies a model's chat template to prompts and conversations.

A template is an untrusted program that comes with the model. The sandbox of transformers protects files and modules,
but does not limit time and memory. So the template runs in a separate process with limits.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ara.data import chat_renderer
from ara.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A message of a conversation: ``role`` and ``content``.
Message: TypeAlias = Mapping[str, str]

_HINT = "use ara generate --no-chat: the model then continues the plain text"
_SYSTEM_HINT = "leave --system out, and say it in the prompt: some models know no system prompt"
_TEXT_HINT = "leave that conversation out, or choose a text without conversations, such as c4"
# Seconds to start Python and import transformers: usually one, more on a busy machine.
_STARTING = 60
# Templates print the current date (Llama 3). Conversations of a text are rendered as of this day, so that equal seeds
# give equal tokens.
_DAY = (2025, 1, 1)
# Limits of many conversations, on top of those of one. Real templates take 0.1 ms and add at most 2,000 characters.
_SECONDS_EACH = 0.02
_CHARACTERS_EACH = 2**13
_CHARACTERS_PER_SECOND = 10**6
# A character in memory takes up to 4 bytes, in the answer up to 12, and both exist at once.
_BYTES_PER_CHARACTER = 32


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


def message(role: Literal["system", "user", "assistant"], content: str) -> Message:
    """Return a message as chat templates expect it."""
    return {"role": role, "content": content}


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], limits: Limits = LIMITS) -> str:
    """Return the prompt that the chat template makes of a conversation, up to the start of an answer.

    The result is that of transformers' ``apply_chat_template``. It contains the special tokens: do not add them again.

    Args:
        tokenizer: with a chat template.
        messages: the conversation so far.
        limits: of the rendering.

    Raises:
        ModelError: there is no default template, or it fails, refuses the prompt, exceeds the limits, or leaves a
            system prompt out.
    """
    system = [one["content"].strip() for one in messages if one["role"] == "system"]
    hint = _SYSTEM_HINT if system else _HINT
    request = [_Request([dict(one) for one in messages], prompt=True)]
    answer = _ask(json.dumps(_message(tokenizer, request, limits, None, hint)), limits)
    if "error" in answer:
        raise ModelError(f"the chat template {answer['error']}", hint)
    text = str(answer["rendered"][0]["text"])
    if not all(content in text for content in system):
        raise ModelError("the chat template leaves the system prompt out", hint)
    return text


@dataclass(frozen=True)
class Rendered:
    """What a chat template makes of a conversation.

    Attributes:
        text: with the special tokens: do not add them again.
        answers: start and end of assistant messages in the text, in characters, with the end of the turn.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the model has a chat template."""
    return bool(tokenizer.chat_template)


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    names: Sequence[str],
    *,
    prompts: bool = False,
    limits: Limits = LIMITS,
) -> list[Rendered]:
    """Render conversations in one process; its limits grow with their number and size.

    The current date, which some templates print, is 1 January 2025.

    Args:
        tokenizer: with a chat template.
        conversations: lists of messages, each with ``role`` and ``content``.
        names: of the conversations, for errors.
        prompts: end each text with the start of an answer. The places of answers are then left out.
        limits: of one conversation.

    Raises:
        ModelError: there is no default template, or it fails, refuses a conversation, exceeds the limits, or renders an
            answer so that it does not continue its prompt.
    """
    requests = [_Request([dict(message) for message in messages], prompts) for messages in conversations]
    renderings = sum(request.renderings for request in requests)
    texts = sum(request.characters for request in requests)
    read = sum(request.characters * request.renderings for request in requests)
    scaled = Limits(
        seconds=limits.seconds + math.ceil(_SECONDS_EACH * renderings + read / _CHARACTERS_PER_SECOND),
        bytes=limits.bytes + _BYTES_PER_CHARACTER * (2 * texts + _CHARACTERS_EACH * len(requests)),
        characters=limits.characters,
    )
    answer = _ask(json.dumps(_message(tokenizer, requests, scaled, _DAY, _TEXT_HINT)), scaled)
    if "error" in answer:
        index = answer.get("index")
        where = "" if index is None else f"{names[index]}: "
        raise ModelError(f"{where}the chat template {answer['error']}", _TEXT_HINT)
    return [
        Rendered(made["text"], tuple((start, end) for start, end in made["answers"])) for made in answer["rendered"]
    ]


@dataclass(frozen=True)
class _Request:
    """One conversation to render."""

    messages: list[dict[str, str]]
    prompt: bool

    @property
    def characters(self) -> int:
        """Characters of its messages."""
        return sum(len(message["role"]) + len(message["content"]) for message in self.messages)

    @property
    def renderings(self) -> int:
        """How often the template runs: for the whole, and twice per answer; see :mod:`ara.data.chat_renderer`."""
        answers = sum(message["role"] == "assistant" for message in self.messages)
        return 1 if self.prompt else 1 + 2 * answers


def _message(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[_Request],
    limits: Limits,
    day: tuple[int, int, int] | None,
    hint: str,
) -> dict[str, Any]:
    """Return the message to the renderer process; ``hint`` is that of an error."""
    return {
        "template": default_template(tokenizer, hint),
        "special": special_tokens(tokenizer),
        "seconds": limits.seconds,
        "bytes": limits.bytes,
        "total": limits.characters + sum(2 * request.characters + _CHARACTERS_EACH for request in requests),
        "day": day,
        "path": sys.path,
        "conversations": [
            {
                "messages": request.messages,
                "prompt": request.prompt,
                "characters": max(limits.characters, 2 * request.characters),
            }
            for request in requests
        ],
    }


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the special tokens by name, as templates get them."""
    return {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}


def default_template(tokenizer: PreTrainedTokenizerBase, hint: str = _TEXT_HINT) -> str:
    """Return the template that is used for conversations without tools.

    Raises:
        ModelError: the model has only others; ``hint`` is that of the error.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # several by name
        names = ", ".join(sorted(map(str, tokenizer.chat_template)))
        raise ModelError(f"the model has the chat templates {names or 'of no name'}, and no default", hint) from None
    if not isinstance(template, str):
        raise ModelError(f"the chat template is a {type(template).__name__}, expected a text", hint)
    return template


def _plain(value: object) -> object:
    """Return special tokens, which tokenizers may keep as objects, as texts."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _ask(request: str, limits: Limits) -> dict[str, Any]:
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
        answer: dict[str, Any] = json.loads(done.stdout)
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
