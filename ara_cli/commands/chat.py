"""``ara chat``: reads lines from a terminal or a pipe, and streams the answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from ara.config import ChatConfig
from ara.errors import AraError, UsageError
from ara.prompts import piped_lines
from ara_cli.options import SourceOption, WhichCheckpoint, WhichExport
from ara_cli.session import Session
from ara_cli.signature import command_line
from ara_cli.streams import piped_input
from export.targets import target_of

if TYPE_CHECKING:
    from export.chat import Chat

# A line of one such word is a command; a message may begin with a space instead.
_COMMAND = re.compile(r"/\w*")
_EXITS = ("/exit", "/quit", "/bye")
_HELP = (
    "/clear   forget the conversation",
    "/exit    end the chat, as Ctrl+D does",
    "/help    show this list",
    "Ctrl+C   stop an answer; what came of it is remembered",
)


@command_line(after={"source": ("device", "dtype")}, without=("force", "offload"))
def command(
    *,
    config: ChatConfig,
    which: Annotated[WhichCheckpoint, "to talk with"],
    exported: Annotated[WhichExport, "runs"],
    source: SourceOption = None,
    s: Session,
) -> None:
    """Talk with the compressed model; it remembers what was said.

    Every line is a message. Lines from a pipe are answered one after the other.
    """
    export = exported.asked(config.backend)
    target_of(config.backend)
    stdin = piped_input("echo 'Who are you?' | ara chat")
    from export.answering import Answerer
    from export.chat import Chat

    chat = Chat(Answerer(config, s.run(), checkpoint=which.asked, source=source, export=export), s.console)
    loop = _Loop(s, chat, stdin)
    loop.run()
    s.console.result({"turns": loop.said, "backend": config.backend, "seed": chat.seed})


class _Loop:
    """Reads and answers until the end.

    In a dialogue an error is shown, and Ctrl+C stops an answer. In a script both end the command.

    Attributes:
        said: prompt and answer of every turn, for ``--json``.
    """

    def __init__(self, s: Session, chat: Chat, stdin: BinaryIO) -> None:
        self._s, self._console, self._chat = s, s.console, chat
        self._is_dialogue = s.console.is_dialogue
        self._lines = _typed(s) if self._is_dialogue else piped_lines(stdin)
        self.said: list[dict[str, Any]] = []

    def run(self) -> None:
        """Answer every line."""
        if self._is_dialogue:
            self._console.fact("/help shows the commands; Ctrl+D ends the chat")
        for line in self._lines:
            if line.rstrip() in _EXITS:
                return
            try:
                self._take(line.rstrip())
            except AraError as error:
                if not self._is_dialogue:
                    raise
                self._console.error(error)

    def _take(self, line: str) -> None:
        """Do what a line says; a blank line says nothing."""
        if _COMMAND.fullmatch(line):
            self._obey(line)
        elif line:
            self._answer(line.strip())

    def _obey(self, word: str) -> None:
        """Run a command of the chat.

        Raises:
            UsageError: there is none of this name.
        """
        if word == "/clear":
            self._chat.clear()
            self._console.fact("the conversation is forgotten")
        elif word == "/help":
            for one in _HELP:
                self._console.fact(one)
        else:
            raise UsageError(
                f"the chat has no command {word}", "/help shows the commands; a message may begin with a space"
            )

    def _answer(self, prompt: str) -> None:
        """Stream the answer to a prompt and remember the turn."""
        answer = None
        try:
            with self._s.interruptible():
                answer = self._chat.answer(prompt)
                for piece in answer:
                    self._console.stream(piece)
        except KeyboardInterrupt:
            if not self._is_dialogue:
                raise
        finally:
            if answer is not None or self._is_dialogue:
                self._console.stream("\n")
        if answer is None:
            return
        if answer.tokens == answer.limit:
            self._console.fact(f"cut off after {answer.limit} tokens: --max-new-tokens")
        self._chat.keep(prompt, answer)
        self.said.append({"prompt": prompt, "answer": answer.text, "empty": answer.is_empty})


def _typed(s: Session) -> Iterator[str]:
    """Yield the lines that somebody types, until Ctrl+D. Ctrl+C discards a line."""
    while True:
        try:
            with s.interruptible():
                line = s.console.ask("> ")
        except EOFError:
            s.console.stream("\n")
            return
        except KeyboardInterrupt:
            s.console.stream("\n")
            s.console.fact("Ctrl+D or /exit ends the chat")
        except UnicodeDecodeError:
            s.console.error(UsageError("the line is not valid UTF-8", "set the terminal to UTF-8"))
        else:
            yield line
