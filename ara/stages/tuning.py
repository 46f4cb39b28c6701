"""Opens the tuning context: model, factors and calibration windows for the stages that choose ranks with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ara.artifacts.factors import FactorsSettings, factor_files
from ara.config import TuningConfig
from ara.environment import keep_freed_memory
from ara.masks.context import TuningContext
from ara.masks.model import MaskedModel
from ara.masks.table_cache import TableCache
from ara.models.placement import choose_placement, torch_dtype
from ara.models.vocabulary import token_rows
from ara.models.weights import LinearSpec
from ara.stages.common import Run, model_of
from ara.workspace.store import Workspace
from ara.workspace.view import StageView

C = TypeVar("C", bound=TuningConfig)


def placed(config: C, run: Run) -> C:
    """Return ``config`` with device and dtype resolved; the reason is reported."""
    placement = choose_placement(config.device, config.dtype)
    run.report.fact(placement.why)
    return config.model_copy(update={"device": placement.device, "dtype": placement.dtype})


def open_tuning_context(
    decomposition: StageView, specs: Sequence[LinearSpec], config: TuningConfig, workspace: Workspace, run: Run
) -> TuningContext:
    """Load the model with its factors, and two separate sets of calibration windows.

    Windows come from the text of the decomposition, in its order: first those that the factors were fitted to, then
    ``samples`` to learn ranks from, then one that is skipped (a document may extend into it; one longer than a window
    extends beyond it), then ``held_out``. If the text is too short, at most a fifth is held out, and windows of the
    decomposition are used again.

    Args:
        decomposition: a verified result of ``ara decompose``.
        specs: its layers, in the wanted layout.
        config: with resolved device and dtype.
        workspace: for the caches.
        run: reporter.

    Raises:
        ModelError: the model is missing or has changed.
        DataError: the text has fewer than three windows.
    """
    from ara.data.texts import load_documents
    from ara.data.tokens import cached_calibration_windows
    from ara.errors import DataError

    assert decomposition.manifest is not None
    made = FactorsSettings.read(decomposition)
    source = model_of(decomposition, run)
    documents = load_documents(made.text, "calibration", report=run.report)
    wanted = made.samples + config.samples + 1 + config.held_out
    windows = cached_calibration_windows(
        workspace.cache / "tokens",
        source.load_tokenizer(),
        documents,
        samples=wanted,
        seq_len=made.seq_len,
        seed=made.seed,
        rows=token_rows(source.config),
        report=run.report,
    ).ids
    if len(windows) < 3:
        raise DataError(
            f"the text {made.text} has {len(windows)} windows of {made.seq_len} tokens, at least 3 are needed",
            "decompose with a longer text or a smaller --seq-len",
        )
    held = config.held_out
    if len(windows) < wanted:
        held = min(held, max(1, len(windows) // 5))
    train = windows[: len(windows) - held - 1][-config.samples :]
    if len(windows) < wanted:
        notes = f"{held} are held out"
        if made.samples > len(windows) - held - 1 - len(train):
            notes += "; the windows for ranks overlap with those that the factors were fitted to"
        if made.samples > len(windows) - held:
            notes += f"; so do the held-out windows (decompose with --samples {len(windows) - held} to avoid it)"
        run.report.warn(f"the text has {len(windows)} windows of {made.seq_len} tokens, {wanted} are needed: {notes}")
    run.report.fact(
        f"{len(train)} windows of {made.seq_len} tokens to learn from, {held} held out ({documents.origin})"
    )
    if config.device == "cpu":
        keep_freed_memory()
    run.report.fact("loading the model")
    model = source.load_model(torch_dtype(config.dtype), config.device)
    masked = MaskedModel(model, list(specs), factor_files(decomposition, specs))
    made_from = decomposition.manifest.id
    tables = None if run.force else TableCache(workspace.cache / "tables", made_from, run.report)
    return TuningContext(masked, train, windows[-held:], config.batch_size, config.seed, run.report, table_cache=tables)
