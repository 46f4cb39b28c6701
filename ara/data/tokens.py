"""Cuts plain text into token windows, reproducibly for a seed; :mod:`ara.data.chat_windows` cuts conversations."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ara.data.texts import Documents
from ara.errors import DataError, UsageError
from ara.models.vocabulary import check_tokens, has_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ara.data.conversations import Conversations

# Most documents and characters per tokenizer call: enough to use all cores, few enough to stop soon after the last
# token that is needed.
_BATCH = 64
_BATCH_CHARACTERS = 2**20
# A document with more characters is tokenised only as far as needed, see :func:`_front`. All documents of C4,
# WikiText-2 and python-docs are shorter.
_LONG = 2**18
# Characters to tokenise per token needed: twice the average of English with a vocabulary of 100,000.
_CHARACTERS = 10
# Tokens just before a cut that are discarded, because the cut may have changed them.
_MARGIN = 1024


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids cut into windows of one length.

    Attributes:
        ids: (windows, seq_len) int64 token ids, on the CPU.
        asked: number of windows requested; without a limit, the number of windows.
        seed: of the document order; ``None`` for the order of the text.
        digest: sha256 (hex) over shape and ids, and over the answers if there are any.
        names: of the texts that the windows come from.
        sources: (windows) int64, the text of each window, as a position in ``names``.
        answers: (windows, seq_len) bool, true for tokens of the assistant's messages, see
            :class:`ara.data.conversations.ConversationTokens`, and for all tokens of plain text; ``None`` if no window
            comes from conversations.
    """

    ids: torch.Tensor
    asked: int
    seed: int | None
    digest: str
    names: tuple[str, ...]
    sources: torch.Tensor
    answers: torch.Tensor | None = None

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.ids.shape[0])

    @property
    def seq_len(self) -> int:
        """Tokens per window."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.ids.numel()

    @property
    def tokens_of(self) -> dict[str, int]:
        """Tokens by text."""
        counts = torch.bincount(self.sources, minlength=len(self.names)).tolist()
        return {name: count * self.seq_len for name, count in zip(self.names, counts, strict=True)}


def calibration_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    rows: int | None = None,
) -> TokenWindows:
    """Shuffle the documents, tokenise as many as needed, and cut the tokens into windows.

    The tokenizer adds its default special tokens to each document. Its end-of-sequence token separates documents. If it
    has none, or the embedding has no row for it, ``documents.separator`` does. A short text gives fewer windows.

    Args:
        documents: the text.
        tokenizer: of the model.
        samples: number of windows, at least 1.
        seq_len: tokens per window, at least 2.
        seed: of the document order.
        rows: of the model's embedding, if known.

    Returns:
        ids (samples or fewer, seq_len).

    Raises:
        UsageError: ``samples`` or ``seq_len`` is too small.
        DataError: the text is shorter than one window, or has a token without an embedding row.
    """
    check_sizes(samples, seq_len)
    texts = list(documents.documents)
    random.Random(seed).shuffle(texts)
    needed = samples * seq_len
    stream: list[int] = []
    eos = tokenizer.eos_token_id if has_row(tokenizer.eos_token_id, rows) else None
    for ids in _token_ids(tokenizer, texts, "" if eos is not None else documents.separator, needed):
        # No two eos in a row: some tokenizers add one at the end, or at the start (GPT-2 and OPT use it as bos).
        if stream and ids and eos is not None and eos not in (stream[-1], ids[0]):
            stream.append(eos)
        stream.extend(ids)
        if len(stream) >= needed:
            break
    return checked(cut(stream, documents, seq_len, samples, seed), documents, tokenizer, rows)


def evaluation_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_windows: int | None = None,
    rows: int | None = None,
) -> TokenWindows:
    """Join the documents, tokenise them, and cut the tokens into consecutive windows; the remainder is dropped.

    As in the evaluations of GPTQ and SVD-LLM: ``tokenizer("\\n\\n".join(rows))`` with the default special tokens, so
    only the first window can have a beginning-of-sequence token.

    Args:
        documents: the text.
        tokenizer: of the model.
        seq_len: tokens per window, at least 2.
        max_windows: number of windows from the front; ``None`` for all.
        rows: of the model's embedding, if known.

    Returns:
        ids (windows, seq_len).

    Raises:
        UsageError: ``max_windows`` or ``seq_len`` is too small.
        DataError: the text is shorter than one window, or has a token without an embedding row.
    """
    check_sizes(1 if max_windows is None else max_windows, seq_len)
    joined = documents.separator.join(documents.documents)
    (stream,) = _token_ids(tokenizer, [joined], "", None if max_windows is None else max_windows * seq_len)
    return checked(cut(stream, documents, seq_len, max_windows, None), documents, tokenizer, rows)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], suffix: str, needed: int | None
) -> Iterator[list[int]]:
    """Yield the ids of each text with ``suffix``; of a long text at least the first ``needed`` (``None``: all)."""
    batch: list[str] = []
    for text in texts:
        if needed is not None and len(text) > max(_LONG, needed * _CHARACTERS):
            yield from _tokenise(tokenizer, batch)
            batch = []
            yield _front(tokenizer, text + suffix, needed)
            continue
        batch.append(text + suffix)
        if len(batch) == _BATCH or sum(map(len, batch)) >= _BATCH_CHARACTERS:
            yield from _tokenise(tokenizer, batch)
            batch = []
    yield from _tokenise(tokenizer, batch)


def _front(tokenizer: PreTrainedTokenizerBase, text: str, needed: int) -> list[int]:
    """Return the first ``needed`` ids of a long text, or all, without tokenising much more.

    Later text can only change ids near a cut: within a word, a run of blanks, or some merges. So the text is cut and
    the ids near the cut are discarded. A second cut at 1.5 times the length must give the same first ``needed`` ids;
    otherwise the whole text is tokenised.
    """
    size = max(_LONG, needed * _CHARACTERS)
    while size < len(text):
        short = _tokenise(tokenizer, [text[: _cut_at(text, size)]])[0]
        if len(short) >= needed + _MARGIN:
            longer = _tokenise(tokenizer, [text[: _cut_at(text, size + size // 2)]])[0]
            if longer[:needed] == short[:needed]:
                return short[:needed]
            break
        size *= 2
    return _tokenise(tokenizer, [text])[0]


def _cut_at(text: str, size: int) -> int:
    """Return where to cut ``text``: at the last line end or blank in the second half of ``size`` characters."""
    if size >= len(text):
        return len(text)
    return max(text.rfind("\n", size // 2, size), 0) or max(text.rfind(" ", size // 2, size), 0) or size


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without the warning about texts longer than the model's context."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return found


def cut(
    stream: list[int],
    text: Documents | Conversations,
    seq_len: int,
    asked: int | None,
    seed: int | None,
    answers: list[bool] | None = None,
) -> TokenWindows:
    """Cut a list of ids into (windows, seq_len), at most ``asked`` of them; the remainder is dropped.

    Args:
        stream: token ids.
        text: where they come from.
        seq_len: tokens per window.
        asked: number of windows; ``None`` for all.
        seed: of the document order.
        answers: of conversations, one per id.

    Raises:
        DataError: the list is shorter than one window.
    """
    windows = len(stream) // seq_len
    if asked is not None:
        windows = min(windows, asked)
    if windows == 0:
        raise DataError(
            f"text {text.name!r} ({text.purpose}) has {len(stream):,} tokens, "
            f"one window needs {seq_len:,} ({text.origin})",
            "choose a smaller --seq-len or a longer text",
        )
    ids = torch.tensor(stream[: windows * seq_len], dtype=torch.int64).view(windows, seq_len)
    marks = None if answers is None else torch.tensor(answers[: windows * seq_len]).view(windows, seq_len)
    asked = windows if asked is None else asked
    sources = torch.zeros(windows, dtype=torch.int64)
    return TokenWindows(ids, asked, seed, windows_digest(ids, marks), (text.name,), sources, marks)


def checked(
    windows: TokenWindows,
    text: Documents | Conversations,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
) -> TokenWindows:
    """Return ``windows``; a token without a row in the embedding is refused with a ``DataError``."""
    check_tokens(windows.ids, rows, tokenizer, f"text {text.name!r} ({text.purpose})")
    return windows


def check_sizes(windows: int, seq_len: int) -> None:
    """Refuse less than one window, and windows of less than two tokens, with a ``UsageError``."""
    if windows < 1:
        raise UsageError(f"got {windows} windows, expected at least 1")
    if seq_len < 2:
        raise UsageError(f"got windows of {seq_len} tokens, expected at least 2 (the first token predicts the second)")


def windows_digest(ids: torch.Tensor, answers: torch.Tensor | None = None) -> str:
    """Return the sha256 (hex) over the shape, the ids as little-endian int64, and the answers as bytes."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    if answers is not None:
        digest.update(answers.numpy().tobytes())
    return digest.hexdigest()
