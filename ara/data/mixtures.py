"""Calibration texts: one text, or a mixture such as ``c4:0.8,chat:0.2``.

A text is named alone, or with its share after a last colon. Shares are numbers in (0, 1]. All texts of a mixture have
one, or none has, which means equal shares. Shares are divided by their sum. Windows of a mixture are read by
:mod:`ara.data.windows`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.data.chat import has_template
from ara.data.conversations import Conversations, load_conversations, require_template
from ara.data.filespecs import split_items, split_share
from ara.data.texts import Documents, check_text_spec, is_chat, load_documents
from ara.errors import UsageError
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_DEFAULT = "c4"
# A chat model that is calibrated on web pages alone ends its answers with the first token. A fifth of conversations
# prevents that: of 24 questions, SmolLM2-135M-Instruct at keep 0.6 left 23 empty without and none with it, for 8 % of
# perplexity on WikiText-2.
DEFAULT_CHAT_SHARE = 0.2
_EXAMPLE = "for example c4:0.8,chat:0.2"
# How far the sum of the shares in a stored spec, which have 6 digits, may be from 1.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Share:
    """A text of a mixture: its name and its share of the windows, in (0, 1]."""

    name: str
    share: float


@dataclass(frozen=True)
class Part:
    """A loaded text of a mixture and its share of the windows, in (0, 1]."""

    text: Documents | Conversations
    share: float


@dataclass(frozen=True)
class CalibrationText:
    """A loaded calibration text.

    Attributes:
        spec: its name, or names and shares; :func:`parse_mixture` reads it.
        parts: at least one; their shares add up to 1.
    """

    spec: str
    parts: tuple[Part, ...]

    @property
    def origin(self) -> str:
        """Where it comes from, in words; shares of a mixture in percent."""
        return origin_in_words([(part.share, part.text.origin) for part in self.parts])

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the text; of a mixture, over the texts and their shares."""
        if len(self.parts) == 1:
            return self.parts[0].text.digest
        content = [[part.text.digest, part.share] for part in self.parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def parse_mixture(spec: str) -> tuple[Share, ...]:
    """Return the texts that ``spec`` names and their shares, which add up to 1.

    Commas and colons may belong to the path of a ``file:`` or ``chat:``: the longest path that exists is taken, then a
    share is looked for.

    Raises:
        UsageError: no text, an unknown one, one named twice, or a share that is missing or out of range.
        DataError: a file is missing or not regular.
    """
    found = [split_share(item) for item in split_items(spec)]
    if not found:
        raise UsageError(f"calibration text {spec!r} names no text", _EXAMPLE)
    for name, share in found:
        check_text_spec(name)
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"the share of {name} is {share:g}, expected a number above 0, at most 1", _EXAMPLE)
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"calibration text {spec!r} names {twice} twice", f"give it one share, {_EXAMPLE}")
    without = [name for name, share in found if share is None]
    if without and len(without) < len(found):
        raise UsageError(
            f"calibration text {spec!r}: {', '.join(without)} without a share, others with one",
            f"give all texts a share or none, {_EXAMPLE}",
        )
    shares = [1.0 if share is None else share for _, share in found]
    # Rounded shares of a stored spec stay as they are, so that it means the same when it is read again.
    total = 1.0 if abs(sum(shares) - 1) < _ROUNDING else sum(shares)
    return tuple(Share(name, share / total) for name, share in zip(names, shares, strict=True))


def mixture_spec(shares: Sequence[Share]) -> str:
    """Return the spec of texts and shares, as :func:`parse_mixture` reads it; of one text, its name."""
    if len(shares) == 1:
        return shares[0].name
    return ",".join(f"{one.name}:{one.share:.6g}" for one in shares)


def resolved_text(spec: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the spec of a calibration text with all shares; of the model's default text if ``spec`` is ``None``.

    Raises:
        UsageError, DataError: as of :func:`parse_mixture`; or the model has no chat template for its conversations.
    """
    if spec is None:
        return default_text(tokenizer)
    shares = parse_mixture(spec)
    for one in shares:
        if is_chat(one.name):
            require_template(tokenizer, one.name)
    return mixture_spec(shares)


def default_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the default calibration text of a model: C4, with a share of chat if it has a chat template."""
    if not has_template(tokenizer):
        return PLAIN_DEFAULT
    return mixture_spec([Share(PLAIN_DEFAULT, 1 - DEFAULT_CHAT_SHARE), Share("chat", DEFAULT_CHAT_SHARE)])


def lacks_chat(spec: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a model with a chat template would be calibrated without conversations."""
    return has_template(tokenizer) and not any(is_chat(one.name) for one in parse_mixture(spec))


def load_calibration_text(spec: str, report: Reporter = SILENT) -> CalibrationText:
    """Load the calibration text that ``spec`` names.

    Args:
        spec: as of :func:`parse_mixture`.
        report: receives progress.

    Raises:
        UsageError, DataError: as of :func:`parse_mixture`; or a text cannot be read.
    """
    # Shares as the spec states them, so that a stored spec gives the same windows.
    spec = mixture_spec(parse_mixture(spec))
    parts = tuple(Part(_load(one.name, report), one.share) for one in parse_mixture(spec))
    return CalibrationText(spec, parts)


def origin_in_words(origins: Sequence[tuple[float, str]]) -> str:
    """Return shares and origins of texts in words; of one text, its origin."""
    if len(origins) == 1:
        return origins[0][1]
    return "; ".join(f"{100 * share:.3g} % {origin}" for share, origin in origins)


def _load(name: str, report: Reporter) -> Documents | Conversations:
    if is_chat(name):
        return load_conversations(name, "calibration", report)
    return load_documents(name, "calibration", report=report)
