"""What ``ara eval`` asks all models: texts, tasks, conversations, and prompts to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.config import EvalConfig
from ara.data.conversations import Conversations, load_conversations
from ara.data.texts import Documents, is_chat, load_documents
from ara.evaluation.generation import prompt_ids
from ara.evaluation.task_folders import TaskFolders
from ara.evaluation.tasks import Task, is_text, load_tasks
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


@dataclass(frozen=True, eq=False)
class Sources:
    """What the tasks of ``ara eval`` name, loaded.

    Attributes:
        texts: name → text for perplexity.
        chats: name → conversations.
        tasks: tasks of lm-eval.
    """

    texts: Mapping[str, Documents]
    chats: Mapping[str, Conversations]
    tasks: Sequence[Task]

    @property
    def digests(self) -> dict[str, str]:
        """Return the sha256 (hex) of every text, all conversations and every task, by name."""
        found = {name: text.digest for name, text in self.texts.items()}
        found |= {name: conversations.digest for name, conversations in self.chats.items()}
        return found | {task.name: task.digest for task in self.tasks}


def load_sources(names: Sequence[str], own: TaskFolders | None, report: Reporter) -> Sources:
    """Load texts, conversations and tasks.

    Args:
        names: of all, in any order.
        own: folders with the user's tasks.
        report: receives progress.

    Raises:
        DataError: a file is missing, empty or malformed, or the hub cannot be reached.
    """
    texts = {name: load_documents(name, "evaluation", report=report) for name in names if is_text(name)}
    chats = {name: load_conversations(name, "evaluation", report) for name in names if is_chat(name)}
    others = [name for name in names if name not in texts and name not in chats]
    return Sources(texts, chats, [task for name in others for task in load_tasks(name, report, own)])


def questions_for(source: ModelSource, sources: Sources, config: EvalConfig, report: Reporter) -> Questions:
    """Return the questions; the prompts to continue come from the first text, or from the user.

    Args:
        source: the model.
        sources: texts, conversations and tasks.
        config: settings with the window length resolved.
        report: receives warnings.

    Raises:
        UsageError: the user's prompt leaves no room for its continuation.
        DataError, ModelError: see :func:`ara.stages.chats.choose_chat`.
    """
    tokenizer, context, rows = source.load_tokenizer(), context_length(source.config), token_rows(source.config)
    chosen = [choose_chat(one, tokenizer, config, rows, report) for one in sources.chats.values()]
    if config.prompt is None:
        room = None if context is None else context - config.max_new_tokens
        prompts = _prompts(sources.texts, config.continuations, tokenizer, room)
    else:
        prompts = [config.prompt]
        check_room(len(prompt_ids(tokenizer, config.prompt)), config.max_new_tokens, context)
    return Questions(tokenizer, sources.texts, sources.tasks, chosen, prompts, rows)


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
