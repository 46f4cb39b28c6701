"""The kind ``checkpoint``: a compressed model as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import StrictBool

from ara.artifacts.base import LEFT_OUT, Count, Least1, Number, Part, Results, Settings, StoredDtype
from ara.artifacts.factors import TextPart
from ara.workspace.view import StageView

CHECKPOINT = "checkpoint"
# The model card within the result; ``ara report`` rewrites it with measurements.
CARD = f"{CHECKPOINT}/README.md"


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """The settings that later stages read: the precision of the stored weights."""

    dtype: StoredDtype


@dataclass(frozen=True)
class RecoveredLevel(Part):
    """What one level of recovery did.

    Attributes:
        level: its name.
        tokens: training tokens read, each pass counted.
        seconds: of this level.
        peak_memory_bytes: of the stage up to the end of this level.
        before, after: KL(dense ‖ model) on held-out text, nats per token; ``after`` belongs to the repair even if it is
            not kept.
        kept: whether the repair is in the checkpoint; it is not if it raised the divergence.
        notes: further figures, in words.
        adapter: KL(dense ‖ model with the LoRA adapter) on held-out text, if the level has put what it learned into an
            adapter beside the weights; the weights are those before the level then.
    """

    level: str
    tokens: Count
    seconds: Number
    peak_memory_bytes: Count | None
    before: Number
    after: Number
    kept: StrictBool
    notes: tuple[str, ...] = ()
    adapter: Number | None = field(default=None, metadata=LEFT_OUT)

    @property
    def in_weights(self) -> bool:
        """Whether the weights of the checkpoint are those that the level has made."""
        return self.kept and self.adapter is None

    @property
    def shown(self) -> float:
        """Divergence after the level: with the adapter, if there is one."""
        return self.after if self.adapter is None else self.adapter

    @property
    def mark(self) -> str:
        """What tables add to a level whose repair is not in the weights."""
        return " (taken back)" if not self.kept else "" if self.adapter is None else " (adapter)"


@dataclass(frozen=True)
class RecoveryFigures(Part):
    """How ``ara recover`` repaired a checkpoint; figures on held-out text in nats per token.

    Attributes:
        parts: the texts.
        windows, held_out: windows to repair with, and to judge by.
        seq_len: tokens per window.
        before, after: KL(dense ‖ model) of the checkpoint that was repaired, and of this one.
        dense_loss, loss_before, loss_after: negative log-likelihood of the dense model and of these two.
        levels: in the order in which they ran.
        stopped: why it ended early; ``None`` if it is complete.
    """

    parts: tuple[TextPart, ...]
    windows: Count
    held_out: Count
    seq_len: Count
    before: Number
    after: Number
    dense_loss: Number
    loss_before: Number
    loss_after: Number
    levels: tuple[RecoveredLevel, ...]
    stopped: str | None = None


@dataclass(frozen=True)
class RoundingFigures(Part):
    """How ``ara quantise`` rounded a checkpoint; losses on held-out text in nats per token.

    Attributes:
        bits: bits per weight → number of matrices in the decoder blocks.
        block: weights per scale, of layers for which the allocation named no other.
        blocks: all lengths in use; ``None`` if there is one.
        zero_points: whether each block has a zero point.
        method: calibrated or nearest.
        windows, held_out: windows to calibrate with, and to judge by.
        seq_len: tokens per window.
        loss_before, loss_after: negative log-likelihood.
        embedding_bits: bits per weight of the embedding and the head; ``None`` if they were not rounded.
    """

    bits: Mapping[str, Count]
    block: Count
    zero_points: StrictBool
    method: str
    windows: Count
    held_out: Count
    seq_len: Count
    loss_before: Number
    loss_after: Number
    embedding_bits: Count | None = field(default=None, metadata=LEFT_OUT)
    blocks: tuple[Count, ...] | None = field(default=None, metadata=LEFT_OUT)

    @property
    def block_words(self) -> str:
        """All numbers of weights per scale in words, such as ``32 or 128``."""
        return " or ".join(map(str, self.blocks or [self.block]))

    @property
    def widths(self) -> str:
        """All bits per weight in words, such as ``8 and 4``."""
        embedding = [] if self.embedding_bits is None else [str(self.embedding_bits)]
        return " and ".join(dict.fromkeys([*self.bits, *embedding]))


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
        recovery: how it was repaired; ``None`` for a checkpoint that was only truncated.
        rounding: how it was rounded to few bits; ``None`` if it was not.
        recovery_after_rounding: how it was repaired after that; ``None`` if it was not.
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
    recovery: RecoveryFigures | None = field(default=None, metadata=LEFT_OUT)
    rounding: RoundingFigures | None = field(default=None, metadata=LEFT_OUT)
    recovery_after_rounding: RecoveryFigures | None = field(default=None, metadata=LEFT_OUT)


def label_of(checkpoint: StageView) -> str:
    """Return the name of a checkpoint in a table, distinct from the rows of dense and uniform."""
    return checkpoint.key if checkpoint.name in ("dense", "uniform") else checkpoint.name
