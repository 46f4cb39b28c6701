"""Models as checkpoint folders, for runtimes that read nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.cutting import save_cut
from ara.models.sources import ModelSource
from ara.progress import SILENT, Reporter

NO_RANKS: Mapping[str, int] = {}
NO_FILES: Mapping[str, Path] = {}


class ModelFolder(NamedTuple):
    """A model as a checkpoint folder.

    Attributes:
        folder: dense or compressed, with a tokenizer.
        parameters: number of parameters.
    """

    folder: Path
    parameters: int


def written(
    source: ModelSource,
    dtype: torch.dtype,
    folder: Path,
    ranks: Mapping[str, int] = NO_RANKS,
    files: Mapping[str, Path] = NO_FILES,
    layout: LayoutName = DEFAULT_LAYOUT,
    report: Reporter = SILENT,
) -> ModelFolder:
    """Write a model to a folder.

    Args:
        source: the dense model.
        dtype: of its weights.
        folder: to be created.
        ranks: module path → kept rank of its low-rank layers.
        files: module path → file with its factors.
        layout: of these layers.
        report: progress.
    """
    processor, stored = source.load_processor(), source.stored_model(dtype)
    how: dict[str, Any] = {"ranks": ranks, "files": files, "layout": layout, "report": report}
    return ModelFolder(folder, save_cut(stored, processor, folder, provenance={}, **how).parameters)
