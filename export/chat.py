"""``ara chat``: a conversation with a compressed model, and what it forgets when the context is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.data.chat import Message, has_template, message
from ara.errors import UsageError
from ara.progress import Reporter
from ara.prompts import check_prompt
from export.answering import Answer, Answerer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer.

    Attributes:
        prompt: what the user said.
        answer: what the model said, as far as it came.
    """

    prompt: str
    answer: str

    @property
    def messages(self) -> list[Message]:
        """The turn as chat templates expect it."""
        return [message("user", self.prompt), message("assistant", self.answer)]


class Chat:
    """A conversation. Every answer reads the whole history again, which the chat template may render anew each time.

    Args:
        model: answers; its weights are read here.
        report: takes warnings.

    Attributes:
        turns: what is remembered.
        seed: of the tokens that are drawn; ``None`` if none is drawn.

    Raises:
        UsageError: the model has no chat template.
        ModelError: its chat template fails, or the model cannot be loaded.
    """

    def __init__(self, model: Answerer, report: Reporter) -> None:
        self._model, self._report = model, report
        if not has_template(self._model.tokenizer):
            raise UsageError(
                "the model has no chat template, which a chat needs", "use ara generate, which continues a text"
            )
        self.turns: list[Turn] = []
        self.seed = self._model.seed
        # A template that fails is found before the weights are read.
        self._model.conversation_ids([message("user", "Hello")])
        self._model.load()

    def clear(self) -> None:
        """Forget the conversation; the next one draws the tokens of a new chat with the same seed."""
        self.turns.clear()
        self._model.forget()

    def answer(self, prompt: str) -> Answer:
        """Return the answer to ``prompt`` in this conversation; :meth:`keep` adds it to the history.

        If the context is full, the oldest turns are forgotten, which is reported.

        Raises:
            UsageError: the prompt is no text, or too long for the model even without a history.
            ModelError: the chat template refuses the conversation.
            DataError: a token has no row in the embedding.
        """
        asked = message("user", check_prompt(prompt))
        forgotten = 0
        ids = self._ids(forgotten, asked)
        while not self._model.has_room(ids) and forgotten < len(self.turns):
            forgotten += 1
            ids = self._ids(forgotten, asked)
        answer = self._model.answer(ids)
        if forgotten:
            del self.turns[:forgotten]
            turns = "the oldest turn is" if forgotten == 1 else f"the {forgotten} oldest turns are"
            self._report.warn(f"the context of the model is full: {turns} forgotten")
        return answer

    def keep(self, prompt: str, answer: Answer) -> None:
        """Add a turn to the history. One without an answer is left out: it would show the model how to be silent."""
        if not answer.is_empty:
            self.turns.append(Turn(prompt, answer.text))

    def _ids(self, forgotten: int, asked: Message) -> torch.Tensor:
        """Return the tokens (t) of the conversation without its ``forgotten`` oldest turns."""
        history = [one for turn in self.turns[forgotten:] for one in turn.messages]
        return self._model.conversation_ids([*history, asked])
