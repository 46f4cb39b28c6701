"""The kind ``checkpoint``: a compressed model as an ordinary Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import StrictBool

from ara.artifacts.base import Count, Least1, Number, Results, Settings, StoredDtype
from ara.workspace.view import StageView

CHECKPOINT = "checkpoint"
# The model card within the result; ``ara report`` rewrites it with measurements.
CARD = f"{CHECKPOINT}/README.md"


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """The settings that later stages read: the precision of the stored weights."""

    dtype: StoredDtype


@dataclass(frozen=True)
class CheckpointResults(Results):
    """Results of every stage that writes a checkpoint.

    Attributes:
        linear_keep, model_keep: share of the dense parameters kept, in the factorised layers and in the model.
        low_rank_layers, dense_layers: counts of factorised layers.
        parameters: of the whole model.
        weight_bytes: of the weights in memory.
        dense_weight_bytes: of the dense model's weights, in the same precision.
        densified: whether the factors were multiplied back.
        disk_bytes: of the weight files.
    """

    Settings = CheckpointSettings
    linear_keep: Number
    model_keep: Number
    low_rank_layers: Count
    dense_layers: Count
    parameters: Count
    weight_bytes: Count
    dense_weight_bytes: Least1
    densified: StrictBool
    disk_bytes: Count


def label_of(checkpoint: StageView) -> str:
    """Return the name of a checkpoint in a table, distinct from the rows of dense and uniform."""
    return checkpoint.key if checkpoint.name in ("dense", "uniform") else checkpoint.name
