"""Opens the tuning context: model, factors and calibration windows for the stages that choose ranks with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ara.artifacts.factors import FactorsSettings, factor_files
from ara.config import TuningConfig
from ara.environment import keep_freed_memory
from ara.masks.context import TuningContext
from ara.masks.model import MaskedModel
from ara.masks.table_cache import TableCache
from ara.models.placement import choose_placement, torch_dtype
from ara.models.weights import LinearSpec
from ara.stages.common import Run, model_of, outputs_folder, window_reader
from ara.workspace.store import Workspace
from ara.workspace.view import StageView

if TYPE_CHECKING:
    import torch

    from ara.data.tokens import TokenWindows

C = TypeVar("C", bound=TuningConfig)


def placed(config: C, run: Run) -> C:
    """Return ``config`` with device and dtype resolved; the reason is reported."""
    placement = choose_placement(config.device, config.dtype)
    run.check_offload(placement.device)
    run.group.check_device(placement.device, placement.dtype)
    run.report.fact(placement.why)
    return config.model_copy(update={"device": placement.device, "dtype": placement.dtype})


def further_windows(
    decomposition: StageView, samples: int, held_out: int, workspace: Workspace, run: Run
) -> tuple[TokenWindows, TokenWindows]:
    """Return windows to learn from and held-out ones, from the text of a decomposition.

    They come in its order, after those that the factors were fitted to; see
    :meth:`ara.data.windows.WindowReader.further`.

    Args:
        decomposition: a verified result of ``ara decompose``.
        samples: windows to learn from.
        held_out: further windows.
        workspace: for the cache.
        run: reporter.

    Raises:
        ModelError: the model is missing or has changed.
        DataError: a text has fewer than three windows.
    """
    from ara.data.mixtures import resolved_text

    made, source = FactorsSettings.read(decomposition), model_of(decomposition, run)
    spec = resolved_text(made.text, source.load_tokenizer())
    reader = window_reader(spec, source, made.seq_len, made.seed, workspace, run)
    train, held = reader.further(made.samples, samples, held_out)
    run.report.fact(
        f"{train.windows} windows of {made.seq_len} tokens to learn from, {held.windows} held out "
        f"({reader.text.origin})"
    )
    return train, held


def open_tuning_context(
    decomposition: StageView,
    specs: Sequence[LinearSpec],
    config: TuningConfig,
    workspace: Workspace,
    run: Run,
    windows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> TuningContext:
    """Load the model with its factors, and two separate sets of calibration windows.

    Args:
        decomposition: a verified result of ``ara decompose``.
        specs: its layers, in the wanted layout.
        config: with resolved device and dtype.
        workspace: for the caches.
        run: reporter.
        windows: to learn from and held out, (w, t) int64 each; by default those of :func:`further_windows`.

    Raises:
        ModelError: the model is missing or has changed.
        DataError: a text has fewer than three windows.
    """
    assert decomposition.manifest is not None
    with run.group.first_of_machine():
        source = model_of(decomposition, run)
    if windows is None and run.group.writes:
        train, held = further_windows(decomposition, config.samples, config.held_out, workspace, run)
        windows = train.ids, held.ids
    learn, held_out = run.group.broadcast(windows)
    if config.device == "cpu":
        keep_freed_memory()
    run.report.fact("loading the model")
    with run.group.first_of_machine():
        model = source.load_model(torch_dtype(config.dtype), config.device)
    files = factor_files(decomposition, specs)
    masked = MaskedModel(model, list(specs), files, run.group, outputs_folder(workspace))
    made_from = decomposition.manifest.id
    tables = None if run.force else TableCache(workspace.cache / "tables", made_from, run.report, run.group)
    return TuningContext(masked, learn, held_out, config.batch_size, config.seed, run.report, table_cache=tables)
