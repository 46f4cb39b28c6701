"""Models as checkpoint folders, for runtimes that read nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.accounting import parameter_count
from ara.models.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_RANKS: Mapping[str, int] = {}


class ModelFolder(NamedTuple):
    """A model as a checkpoint folder.

    Attributes:
        folder: dense or compressed, with a tokenizer.
        parameters: number of parameters.
    """

    folder: Path
    parameters: int


def written(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    ranks: Mapping[str, int] = NO_RANKS,
    layout: LayoutName = DEFAULT_LAYOUT,
) -> ModelFolder:
    """Write a model to a folder.

    Args:
        load: loads it.
        tokenizer: of the model.
        folder: to be created.
        ranks: module path → kept rank of its low-rank layers.
        layout: of these layers.
    """
    model = load()
    parameters = parameter_count(model)
    save_checkpoint(model, tokenizer, folder, ranks=ranks, provenance={}, layout=layout)
    return ModelFolder(folder, parameters)
