"""Conversations as a text: read from files and the hub, rendered by the model's chat template, with answers marked.

``chat`` is read from ``$ARA_DATA_DIR`` if it is set, else it is ``ultrachat``. ``chat:PATH`` is a user's own file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ara.data import chat
from ara.data.filespecs import CHAT_PREFIX, origin_of, text_file
from ara.data.textfiles import EXAMPLE, read_lists
from ara.data.texts import TEXTS, Part, Purpose, check_text_spec, data_dir, is_chat, read_part
from ara.errors import DataError, UsageError
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ANSWERING = "assistant"
# Name of the JSON field or Parquet column that holds the messages, as in the data sets of the hub.
DEFAULT_FIELD = "messages"
# Most conversations and characters per renderer process, whose memory grows with them.
_BATCH = 256
_BATCH_CHARACTERS = 2**21


@dataclass(frozen=True)
class Message:
    """One message: ``role`` (``user``, ``assistant``, ``system``) and ``content``, a text that is not blank."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: at least one.
        where: its place in the source, for errors.
    """

    messages: tuple[Message, ...]
    where: str = field(default="a conversation", compare=False)

    @property
    def characters(self) -> int:
        """Characters of all messages."""
        return sum(len(message.content) for message in self.messages)

    def plain(self) -> list[dict[str, str]]:
        """Return the messages as chat templates expect them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


@dataclass(frozen=True)
class Conversations:
    """A loaded text of conversations; the counterpart of :class:`ara.data.texts.Documents`.

    Attributes:
        name: ``chat``, ``ultrachat`` or ``chat:PATH``, as asked for.
        purpose: calibration or evaluation.
        conversations: in the order of the source.
        origin: where they come from, in words.
        digest: sha256 (hex) over roles, contents and their lengths.
    """

    name: str
    purpose: Purpose
    conversations: tuple[Conversation, ...]
    origin: str
    digest: str


@dataclass(frozen=True, eq=False)
class ConversationTokens:
    """A rendered conversation.

    Attributes:
        ids: (t) int64 token ids, with the special tokens of the template.
        answers: (t) bool, true for the tokens of assistant messages and for the token that ends each. A blank after
            that token, which models do not generate, is false. If the template renders an earlier answer in another way
            than the last one, as Qwen3's does, only later answers are marked.
    """

    ids: torch.Tensor
    answers: torch.Tensor


# 4,000 conversations hold about 5 million tokens, more than enough.
_ULTRACHAT: dict[Purpose, Part] = {
    "calibration": Part(
        "ultrachat_200k/train_sft.jsonl", "HuggingFaceH4/ultrachat_200k", None, None, "train_sft", 4_000, DEFAULT_FIELD
    ),
    "evaluation": Part(
        "ultrachat_200k/test_sft.jsonl", "HuggingFaceH4/ultrachat_200k", None, None, "test_sft", 1_000, DEFAULT_FIELD
    ),
}
_CHAT: dict[Purpose, Part] = {
    "calibration": replace(_ULTRACHAT["calibration"], local="instructions/calibration.jsonl"),
    "evaluation": replace(_ULTRACHAT["evaluation"], local="instructions/evaluation.jsonl"),
}


def load_conversations(spec: str, purpose: Purpose, report: Reporter = SILENT) -> Conversations:
    """Load the conversations that ``spec`` names: ``chat``, ``ultrachat`` or ``chat:PATH``.

    The calibration and evaluation parts of a named text are different splits. ``chat:PATH`` gives the same
    conversations for both.

    Raises:
        UsageError: no such text, or one without conversations.
        DataError: a file is missing, empty or malformed, or the hub cannot be reached.
    """
    check_text_spec(spec)
    if not is_chat(spec):
        raise UsageError(f"text {spec!r} holds no conversations", "choose chat, ultrachat or chat:PATH")
    if spec.startswith(CHAT_PREFIX):
        file = text_file(spec)
        rows = read_lists(file.path, file.field or DEFAULT_FIELD)
        found = [parse_conversation(where, value) for where, value in rows]
        return _conversations(spec, purpose, found, origin_of(file))
    loaded: Conversations = TEXTS.load(spec)(purpose, report)
    return loaded


def load_chat(purpose: Purpose, report: Reporter = SILENT) -> Conversations:
    """Load ``$ARA_DATA_DIR/instructions``, or UltraChat if the variable is not set."""
    if data_dir() is None:
        report.fact("the text chat is ultrachat, because ARA_DATA_DIR is not set")
    return _load("chat", purpose, _CHAT[purpose], report)


def load_ultrachat(purpose: Purpose, report: Reporter = SILENT) -> Conversations:
    """Load UltraChat: the front of its training split, or of its test split."""
    return _load("ultrachat", purpose, _ULTRACHAT[purpose], report)


def _load(name: str, purpose: Purpose, part: Part, report: Reporter) -> Conversations:
    rows, origin = read_part(name, purpose, part, report)
    if data_dir() is not None:
        return _conversations(name, purpose, [parse_conversation(where, value) for where, value in rows], origin)
    # Nobody can correct a row of the hub.
    found = []
    for where, value in rows:
        try:
            found.append(parse_conversation(where, value))
        except DataError:
            continue
    if len(found) < len(rows):
        origin += f" ({len(rows) - len(found)} without text left out)"
    return _conversations(name, purpose, found, origin)


def parse_conversation(where: str, value: Any) -> Conversation:
    """Return the conversation that ``value`` holds: a list of objects with ``role`` and ``content``.

    Args:
        where: its place, for errors, such as ``a.jsonl, line 3``.
        value: of the field.

    Raises:
        DataError: another shape, no message, or a message without text.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: messages are a {type(value).__name__}, expected a list", f"expected {EXAMPLE}")
    if not value:
        raise DataError(f"{where}: the conversation has no messages", "remove that line")
    messages = []
    for number, item in enumerate(value, start=1):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            got = f"an object with {', '.join(map(str, item)) or 'nothing'}" if isinstance(item, dict) else repr(item)
            raise DataError(
                f"{where}: message {number} is {got[:80]}, expected an object with the texts role and content",
                f"expected {EXAMPLE}",
            )
        if not role.strip() or not content.strip():
            raise DataError(
                f"{where}: message {number} has an empty {'content' if role.strip() else 'role'}, expected text",
                "remove that line",
            )
        messages.append(Message(role, content))
    return Conversation(tuple(messages), where)


def _conversations(name: str, purpose: Purpose, found: list[Conversation], origin: str) -> Conversations:
    if not found:
        raise DataError(
            f"text {name!r} ({purpose}) is empty: {origin}", f"it must hold at least one conversation: {EXAMPLE}"
        )
    digest = hashlib.sha256()
    for conversation in found:
        digest.update(len(conversation.messages).to_bytes(8, "little"))
        for message in conversation.messages:
            for text in (message.role.encode(), message.content.encode()):
                digest.update(len(text).to_bytes(8, "little") + text)
    return Conversations(name, purpose, tuple(found), origin, digest.hexdigest())


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], limits: chat.Limits = chat.LIMITS
) -> list[ConversationTokens]:
    """Render conversations and tokenise them.

    Args:
        tokenizer: with a chat template.
        conversations: to render.
        limits: of one conversation; see :func:`ara.data.chat.render`.

    Raises:
        DataError: the model has no chat template.
        ModelError: the template fails, refuses a conversation, exceeds the limits, or renders the last answer so that
            it does not continue its prompt.
    """
    return [
        _marked(tokenizer, rendered)
        for batch in _batches(conversations)
        for rendered in _rendered(tokenizer, batch, False, limits)
    ]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], limits: chat.Limits = chat.LIMITS
) -> list[torch.Tensor]:
    """Return the prompt of the last answer of each conversation, (t) int64.

    It holds all messages before the last one if that is the assistant's, else all messages; then the start of an
    answer. Arguments and errors as of :func:`conversation_tokens`.
    """
    import torch

    asked = [
        Conversation(one.messages[:-1], one.where) if one.messages[-1].role == ANSWERING else one
        for one in conversations
    ]
    return [
        torch.tensor(_ids(tokenizer, rendered.text), dtype=torch.int64)
        for batch in _batches(asked)
        for rendered in _rendered(tokenizer, batch, True, limits)
    ]


def require_template(tokenizer: PreTrainedTokenizerBase, name: str = "chat") -> None:
    """Check that the model has a chat template, which the text ``name`` needs.

    Raises:
        DataError: it has none.
    """
    if not chat.has_template(tokenizer):
        raise DataError(
            f"the model has no chat template, which the text {name!r} needs",
            "choose a text without conversations, such as c4; base models are not made for chat",
        )


def _batches(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    for conversation in conversations:
        batch.append(conversation)
        if len(batch) == _BATCH or sum(one.characters for one in batch) >= _BATCH_CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _rendered(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Conversation], prompts: bool, limits: chat.Limits
) -> list[chat.Rendered]:
    require_template(tokenizer)
    names = [one.where for one in batch]
    return chat.render(tokenizer, [one.plain() for one in batch], names, prompts=prompts, limits=limits)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a rendered text, which holds its special tokens already."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _marked(tokenizer: PreTrainedTokenizerBase, rendered: chat.Rendered) -> ConversationTokens:
    """Tokenise a rendered conversation and mark its answers.

    Tokens of a text are compared with those of its beginnings. A token across the start of an answer counts as part of
    it. Offsets of characters would be simpler, but only some tokenizers give them.
    """
    import torch

    ids = _ids(tokenizer, rendered.text)
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    answers = torch.zeros(len(ids), dtype=torch.bool)
    for first, last in rendered.answers:
        start = _shared(ids, _ids(tokenizer, rendered.text[:first]))
        end = len(ids) if last == len(rendered.text) else _shared(ids, _ids(tokenizer, rendered.text[:last]))
        answers[start : _end_of_turn(tokenizer, ids, start, end, special)] = True
    return ConversationTokens(torch.tensor(ids, dtype=torch.int64), answers)


def _shared(ids: list[int], beginning: list[int]) -> int:
    """Return how many tokens two lists share at their start."""
    pairs = enumerate(zip(ids, beginning, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(ids), len(beginning)))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int, special: set[int]) -> int:
    """Return the end of the answer ``ids[start:end]`` without a blank after the special token that ends the turn."""
    last = end
    while last > start and ids[last - 1] not in special and not tokenizer.decode(ids[last - 1 : last]).strip():
        last -= 1
    return last if last > start and ids[last - 1] in special else end
