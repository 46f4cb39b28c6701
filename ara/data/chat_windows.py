"""Cuts conversations into token windows, with their answers marked."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ara.data.conversations import Conversation, Conversations, conversation_tokens, require_template
from ara.data.tokens import TokenWindows, check_sizes, checked, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters to render per token needed: the average of English is 4 to 5, and a template adds tokens.
_CHARACTERS = 5


def conversation_windows(
    text: Conversations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    rows: int | None = None,
) -> TokenWindows:
    """Shuffle the conversations, render and tokenise as many as needed, and cut the tokens into windows.

    Conversations follow each other without a separator: the template marks their turns. A short text gives fewer
    windows.

    Args:
        text: the conversations.
        tokenizer: of the model, with a chat template.
        samples: number of windows, at least 1.
        seq_len: tokens per window, at least 2.
        seed: of the order of the conversations.
        rows: of the model's embedding, if known.

    Returns:
        ids and answers (samples or fewer, seq_len).

    Raises:
        UsageError: ``samples`` or ``seq_len`` is too small.
        DataError: the model has no chat template, the text is shorter than one window, or a token has no embedding row.
        ModelError: the template cannot be used, see :func:`ara.data.conversations.conversation_tokens`.
    """
    check_sizes(samples, seq_len)
    require_template(tokenizer, text.name)
    waiting = list(text.conversations)
    random.Random(seed).shuffle(waiting)
    needed = samples * seq_len
    ids: list[int] = []
    answers: list[bool] = []
    while waiting and len(ids) < needed:
        batch = _front(waiting, (needed - len(ids)) * _CHARACTERS)
        waiting = waiting[len(batch) :]
        for tokens in conversation_tokens(tokenizer, batch):
            ids += tokens.ids.tolist()
            answers += tokens.answers.tolist()
    return checked(cut(ids, text, seq_len, samples, seed, answers), text, tokenizer, rows)


def _front(conversations: list[Conversation], characters: int) -> list[Conversation]:
    """Return the first conversations, as many as have the wanted number of characters."""
    total = 0
    for count, conversation in enumerate(conversations, start=1):
        total += conversation.characters
        if total >= characters:
            return conversations[:count]
    return conversations
