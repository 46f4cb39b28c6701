"""What ``ara eval`` asks all models: texts, tasks, conversations, and prompts to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.config import EvalConfig
from ara.data.conversations import Conversations
from ara.data.texts import Documents
from ara.evaluation.generation import prompt_ids
from ara.evaluation.tasks import Task
from ara.models.context import check_room, context_length
from ara.models.sources import ModelSource
from ara.models.vocabulary import token_rows
from ara.progress import Reporter
from ara.stages.chats import Chat, choose_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words of a prompt, and of the shortest document that gives one. A prompt is at most half of its document.
_PROMPT_WORDS, _LEAST_WORDS = 24, 8


@dataclass(frozen=True, eq=False)
class Questions:
    """What all models are asked.

    Attributes:
        tokenizer: of the model.
        texts: name → text for perplexity.
        tasks: tasks of lm-eval.
        chats: conversations.
        prompts: prompts that every model continues.
        rows: rows of the models' embedding, if known.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, Documents]
    tasks: Sequence[Task]
    chats: Sequence[Chat]
    prompts: Sequence[str]
    rows: int | None = None


def questions_for(
    source: ModelSource,
    texts: Mapping[str, Documents],
    tasks: Sequence[Task],
    chats: Mapping[str, Conversations],
    config: EvalConfig,
    report: Reporter,
) -> Questions:
    """Return the questions; the prompts to continue come from the first text, or from the user.

    Args:
        source: the model.
        texts: name → text.
        tasks: tasks of lm-eval.
        chats: name → conversations.
        config: settings with the window length resolved.
        report: receives warnings.

    Raises:
        UsageError: the user's prompt leaves no room for its continuation.
        DataError, ModelError: see :func:`ara.stages.chats.choose_chat`.
    """
    tokenizer, context, rows = source.load_tokenizer(), context_length(source.config), token_rows(source.config)
    chosen = [choose_chat(one, tokenizer, config, rows, report) for one in chats.values()]
    if config.prompt is None:
        room = None if context is None else context - config.max_new_tokens
        prompts = _prompts(texts, config.continuations, tokenizer, room)
    else:
        prompts = [config.prompt]
        check_room(len(prompt_ids(tokenizer, config.prompt, chat=False)), config.max_new_tokens, context)
    return Questions(tokenizer, texts, tasks, chosen, prompts, rows)


def _prompts(
    texts: Mapping[str, Documents], count: int, tokenizer: PreTrainedTokenizerBase, room: int | None
) -> list[str]:
    """Return the beginnings of up to ``count`` documents of the first text, each of at most ``room`` tokens."""
    prompts: list[str] = []
    for text in next(iter(texts.values())).documents if texts else ():
        words = text.split(maxsplit=2 * _PROMPT_WORDS)  # a text of one document may have millions
        prompt = " ".join(words[: min(_PROMPT_WORDS, len(words) // 2)])
        if len(prompts) == count:
            break
        if len(words) >= _LEAST_WORDS and (room is None or len(tokenizer(prompt)["input_ids"]) <= room):
            prompts.append(prompt)
    return prompts
