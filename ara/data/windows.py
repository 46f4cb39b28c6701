"""Windows of a calibration text: each text of a mixture gives its share of them, and further windows on request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.data.mixtures import CalibrationText, Part
from ara.data.token_cache import cached_calibration_windows
from ara.data.tokens import TokenWindows, check_sizes, windows_digest
from ara.errors import DataError
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# 1 / largest share of its windows that a short text holds out.
_HELD_OUT_OF = 5


@dataclass(frozen=True)
class WindowReader:
    """Reads the windows of a calibration text for one model.

    Attributes:
        cache_dir: folder of the token cache.
        tokenizer: of the model.
        text: the text or mixture.
        seq_len: tokens per window, at least 2.
        seed: of the order of documents, and of the order in which the texts of a mixture take turns.
        rows: of the model's embedding, if known.
        report: receives progress and warnings.
    """

    cache_dir: Path
    tokenizer: PreTrainedTokenizerBase
    text: CalibrationText
    seq_len: int
    seed: int
    rows: int | None = None
    report: Reporter = SILENT

    def first(self, samples: int) -> TokenWindows:
        """Return the first ``samples`` windows; fewer, with a warning, if a text is short.

        The texts take turns at random, in proportion to their shares. So every beginning of the windows has about these
        shares, and the first windows do not depend on ``samples``.

        Raises:
            UsageError: ``samples`` is less than 1.
            DataError: a text is shorter than one window, or a token has no embedding row.
            ModelError: the chat template cannot be used.
        """
        check_sizes(samples, self.seq_len)
        turns = self._turns(samples)
        found: list[TokenWindows | None] = []
        for index, part in enumerate(self.text.parts):
            wanted = turns.count(index)
            windows = self._windows(part, wanted) if wanted else None
            if windows is None:
                share = f"{100 * part.share:.3g} %"
                self.report.warn(f"no window comes from {part.text.name}: its share of {share} is less than one window")
            elif windows.windows < wanted:
                had = f"only {windows.windows} of the {wanted} requested windows"
                self.report.warn(f"{self._subject(part)} has {had} of {self.seq_len} tokens")
            found.append(windows)
        return self._joined(found, turns)

    def further(self, used: int, samples: int, held_out: int) -> tuple[TokenWindows, TokenWindows]:
        """Return windows to learn from, and held-out ones, after the first ``used`` ones.

        Each text of a mixture gives its share of both. Between the two, one window of each text is skipped: a document
        may extend into it (one longer than a window extends beyond it). If a text is too short, at most a fifth of its
        windows are held out, and windows among the first ``used`` ones are learnt from again. If these do not suffice
        either, one text alone gives fewer windows; in a mixture its windows repeat, so that its share stays.

        Args:
            used: windows that another stage has read, see :meth:`first`.
            samples: windows to learn from, at least 1.
            held_out: windows to hold out, at least 1.

        Raises:
            DataError: a text has fewer than three windows; otherwise as of :meth:`first`.
            ModelError: as of :meth:`first`.
        """
        turns = self._turns(used + samples + held_out)
        learnt_turns, held_turns = turns[used : used + samples], turns[used + samples :]
        learn: list[TokenWindows | None] = []
        held: list[TokenWindows | None] = []
        for index, part in enumerate(self.text.parts):
            sizes = [chosen.count(index) for chosen in (turns[:used], learnt_turns, held_turns)]
            one, other = self._split(part, *sizes) if sum(sizes[1:]) else (None, None)
            learn.append(one)
            held.append(other)
        return self._joined(learn, learnt_turns, repeat=True), self._joined(held, held_turns)

    def _windows(self, part: Part, samples: int) -> TokenWindows:
        return cached_calibration_windows(
            self.cache_dir,
            self.tokenizer,
            part.text,
            samples=samples,
            seq_len=self.seq_len,
            seed=self.seed,
            rows=self.rows,
            report=self.report,
        )

    def _split(self, part: Part, used: int, samples: int, held: int) -> tuple[TokenWindows, TokenWindows]:
        """Return windows of one text to learn from, and held-out ones; see :meth:`further`."""
        wanted = used + samples + 1 + held
        windows = self._windows(part, wanted)
        count = windows.windows
        if count < 3:
            raise DataError(
                f"the text {part.text.name} has {count} windows of {self.seq_len} tokens, at least 3 are needed",
                "use a longer text, or a smaller --seq-len",
            )
        if count < wanted:
            held = min(held, max(1, count // _HELD_OUT_OF))
        end = count - held - 1
        rows = (used + torch.arange(min(samples, end))) % end
        if count < wanted:
            notes = f"{held} are held out"
            if used + samples > end:
                notes += "; the windows to learn from overlap with those that the factors were fitted to"
            if end < samples and len(self.text.parts) > 1:
                notes += "; the windows to learn from repeat"
            if used > count - held:
                notes += "; so do the held-out windows"
                if len(self.text.parts) == 1:
                    notes += f" (decompose with --samples {count - held} to avoid it)"
            self.report.warn(
                f"{self._subject(part)} has {count} windows of {self.seq_len} tokens, {wanted} are needed: {notes}"
            )
        return some(windows, rows), some(windows, slice(count - held, count))

    def _subject(self, part: Part) -> str:
        return "the text" if len(self.text.parts) == 1 else f"the text {part.text.name}"

    def _turns(self, count: int) -> list[int]:
        return take_turns([part.share for part in self.text.parts], count, self.seed)

    def _joined(self, found: Sequence[TokenWindows | None], turns: Sequence[int], repeat: bool = False) -> TokenWindows:
        """Put the windows of the texts into the order of ``turns``; a text that has no more is left out, or repeats."""
        if len(found) == 1 and found[0] is not None:
            return found[0]
        names = tuple(part.text.name for part in self.text.parts)
        left = [0 if windows is None else windows.windows for windows in found]
        starts = [sum(left[:index]) for index in range(len(left))]
        given = [0] * len(left)
        order, sources = [], []
        for turn in turns:
            if given[turn] < left[turn] or (repeat and left[turn]):
                order.append(starts[turn] + given[turn] % left[turn])
                given[turn] += 1
                sources.append(turn)
        there = [windows for windows in found if windows is not None]
        ids = torch.cat([windows.ids for windows in there])[order]
        answers = None
        if any(windows.answers is not None for windows in there):
            answers = torch.cat([_answers(windows) for windows in there])[order]
        digest = windows_digest(ids, answers)
        return TokenWindows(ids, len(turns), self.seed, digest, names, torch.tensor(sources), answers)


def take_turns(shares: Sequence[float], count: int, seed: int) -> list[int]:
    """Return which of several texts gives each of ``count`` windows.

    At each position a text is drawn at random, with a probability in proportion to the windows that it lacks. A text
    never has more than one window beyond its share of those so far. The first positions do not depend on ``count``.

    Args:
        shares: of the texts, above 0.
        count: number of windows.
        seed: of the random numbers.

    Returns:
        Positions in ``shares``.
    """
    if len(shares) == 1:
        return [0] * count
    random_numbers = random.Random(seed)
    total = sum(shares)
    given = [0] * len(shares)
    turns = []
    for position in range(1, count + 1):
        lacking = [max(0.0, position * share / total - had) for share, had in zip(shares, given, strict=True)]
        turn = random_numbers.choices(range(len(shares)), lacking)[0]
        given[turn] += 1
        turns.append(turn)
    return turns


def some(windows: TokenWindows, rows: slice | torch.Tensor) -> TokenWindows:
    """Return some of the windows."""
    ids = windows.ids[rows]
    answers = None if windows.answers is None else windows.answers[rows]
    digest = windows_digest(ids, answers)
    return TokenWindows(ids, len(ids), windows.seed, digest, windows.names, windows.sources[rows], answers)


def _answers(windows: TokenWindows) -> torch.Tensor:
    """Return the answers of the windows; all tokens of plain text."""
    return torch.ones_like(windows.ids, dtype=torch.bool) if windows.answers is None else windows.answers
