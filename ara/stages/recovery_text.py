"""The windows that ``ara recover`` repairs with, and those that it judges by."""

from __future__ import annotations

from dataclasses import dataclass

from ara.artifacts.factors import FactorsSettings, TextPart
from ara.config import RecoverConfig
from ara.models.sources import ModelSource
from ara.models.vocabulary import token_rows
from ara.recovery.base import RecoveryText
from ara.stages.common import Run, check_window, text_parts, warn_without_chat
from ara.workspace.store import Workspace
from ara.workspace.view import StageView


@dataclass(frozen=True)
class RecoveryTexts:
    """Text of one recovery.

    Attributes:
        spec: what was asked for.
        parts: the texts of the mixture.
        digest: sha256 (hex) of the source.
        seq_len: tokens per window.
        train, held_out: windows; at least one window lies between them.
    """

    spec: str
    parts: tuple[TextPart, ...]
    digest: str
    seq_len: int
    train: RecoveryText
    held_out: RecoveryText


def recovery_texts(
    config: RecoverConfig, decomposition: StageView, source: ModelSource, workspace: Workspace, run: Run
) -> RecoveryTexts:
    """Return the windows of a recovery.

    Training windows are the first ones of the text; the factors may have been fitted to the same ones. Held-out windows
    follow after those of training, and after those of the decomposition if it has the same text.

    Raises:
        UsageError: the text or the window length cannot be used.
        DataError: a text has fewer than three windows.
    """
    from ara.data.mixtures import load_calibration_text, resolved_text
    from ara.data.windows import WindowReader

    made = FactorsSettings.read(decomposition)
    tokenizer = source.load_tokenizer()
    spec, seq_len = resolved_text(config.text or made.text, tokenizer), config.seq_len or made.seq_len
    check_window(seq_len, source.config)
    warn_without_chat(spec, tokenizer, run)
    text = load_calibration_text(spec, run.report)
    run.report.fact(f"text: {text.origin}")
    same = spec == resolved_text(made.text, tokenizer) and (seq_len, config.seed) == (made.seq_len, made.seed)
    rows, folder = token_rows(source.config), workspace.cache / "tokens"
    reader = WindowReader(folder, tokenizer, text, seq_len, config.seed, rows, run.report)
    train, held = reader.further(0, max(config.samples, made.samples if same else 0), config.held_out)
    ids, answers = train.ids[: config.samples], train.answers
    counted = None if config.loss_on == "all" or answers is None else answers[: config.samples]
    run.report.fact(f"{len(ids)} windows of {seq_len} tokens to repair with, {held.windows} held out")
    parts = text_parts(text, train)
    return RecoveryTexts(spec, parts, text.digest, seq_len, RecoveryText(ids, counted), RecoveryText(held.ids))
