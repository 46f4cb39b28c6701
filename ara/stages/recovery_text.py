"""The windows that ``ara recover`` repairs with, and those that it judges by."""

from __future__ import annotations

from dataclasses import dataclass

from ara.artifacts.factors import FactorsSettings
from ara.config import RecoverConfig
from ara.errors import DataError
from ara.models.sources import ModelSource
from ara.models.vocabulary import token_rows
from ara.recovery.base import RecoveryText
from ara.stages.common import Run, check_window
from ara.workspace.store import Workspace
from ara.workspace.view import StageView


@dataclass(frozen=True)
class RecoveryTexts:
    """Text of one recovery.

    Attributes:
        spec: what was asked for.
        origin: its source, in words.
        digest: sha256 (hex) of the source.
        seq_len: tokens per window.
        train, held_out: windows; at least one window lies between them.
    """

    spec: str
    origin: str
    digest: str
    seq_len: int
    train: RecoveryText
    held_out: RecoveryText


def recovery_texts(
    config: RecoverConfig, decomposition: StageView, source: ModelSource, workspace: Workspace, run: Run
) -> RecoveryTexts:
    """Return the windows of a recovery.

    Training windows are the first ones of the text; the factors may have been fitted to the same ones. Held-out windows
    come last: after those of training, and of the decomposition if it has the same text. If the text is too short, at
    most a fifth of the windows is held out.

    Raises:
        DataError: the text has fewer than three windows.
    """
    from ara.data.texts import load_documents
    from ara.data.tokens import cached_calibration_windows

    made = FactorsSettings.read(decomposition)
    spec, seq_len = config.text or made.text, config.seq_len or made.seq_len
    check_window(seq_len, source.config)
    documents = load_documents(spec, "calibration", report=run.report)
    run.report.fact(f"text: {documents.origin}")
    same = spec == made.text and seq_len == made.seq_len and config.seed == made.seed
    wanted = max(config.samples, made.samples if same else 0) + 1 + config.held_out
    windows = cached_calibration_windows(
        workspace.cache / "tokens",
        source.load_tokenizer(),
        documents,
        samples=wanted,
        seq_len=seq_len,
        seed=config.seed,
        rows=token_rows(source.config),
        report=run.report,
    ).ids
    if len(windows) < 3:
        raise DataError(
            f"the text {spec} has {len(windows)} windows of {seq_len} tokens, at least 3 are needed: "
            "to repair with, to keep apart, to judge by",
            "use a longer text or a smaller --seq-len",
        )
    held = config.held_out if len(windows) >= wanted else min(config.held_out, max(1, len(windows) // 5))
    train = windows[: len(windows) - held - 1][: config.samples]
    if len(windows) < wanted:
        run.report.warn(
            f"the text has {len(windows)} windows of {seq_len} tokens, {wanted} are needed: {len(train)} to repair "
            f"with, {held} held out"
        )
    return RecoveryTexts(
        spec, documents.origin, documents.digest, seq_len, RecoveryText(train), RecoveryText(windows[-held:])
    )
