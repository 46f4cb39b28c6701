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
from ara.models.weights import LinearSpec
from ara.stages.common import Run, model_of, window_reader
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

    Windows come from the text of the decomposition, in its order, after those that the factors were fitted to; see
    :meth:`ara.data.windows.WindowReader.further`.

    Args:
        decomposition: a verified result of ``ara decompose``.
        specs: its layers, in the wanted layout.
        config: with resolved device and dtype.
        workspace: for the caches.
        run: reporter.

    Raises:
        ModelError: the model is missing or has changed.
        DataError: a text has fewer than three windows.
    """
    from ara.data.mixtures import resolved_text

    assert decomposition.manifest is not None
    made = FactorsSettings.read(decomposition)
    source = model_of(decomposition, run)
    spec = resolved_text(made.text, source.load_tokenizer())
    reader = window_reader(spec, source, made.seq_len, made.seed, workspace, run)
    train, held = reader.further(made.samples, config.samples, config.held_out)
    run.report.fact(
        f"{train.windows} windows of {made.seq_len} tokens to learn from, {held.windows} held out "
        f"({reader.text.origin})"
    )
    if config.device == "cpu":
        keep_freed_memory()
    run.report.fact("loading the model")
    model = source.load_model(torch_dtype(config.dtype), config.device)
    masked = MaskedModel(model, list(specs), factor_files(decomposition, specs))
    made_from = decomposition.manifest.id
    tables = None if run.force else TableCache(workspace.cache / "tables", made_from, run.report)
    return TuningContext(masked, train.ids, held.ids, config.batch_size, config.seed, run.report, table_cache=tables)
