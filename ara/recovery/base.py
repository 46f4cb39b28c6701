"""The interface of a level of recovery: two models and text in, a repaired model out.

Names: x is the input of a layer in the dense model, x' its input in the compressed model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ara.config import RecoverConfig
from ara.distributed.group import ALONE, Group
from ara.errors import NumericalError
from ara.models.blocks import Stream, independent_starts
from ara.models.kept import Keep, Keeper, in_memory
from ara.models.likelihood import summed_nll
from ara.models.losses import losses_at
from ara.models.scores import Head
from ara.models.weights import LinearSpec, find_blocks
from ara.progress import SILENT, Reporter
from ara.recovery.optimiser import MasterOptimiser, Method, Stored

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RecoveryText:
    """Token windows of one length.

    Attributes:
        ids: (w, t) int64.
        counted: (w, t) bool, the tokens whose prediction counts in losses; ``None`` for all. The first token of a
            window is never predicted.
    """

    ids: torch.Tensor
    counted: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.ids.numel()

    def rows(self, rows: slice | torch.Tensor) -> RecoveryText:
        """Return some windows."""
        return RecoveryText(self.ids[rows], None if self.counted is None else self.counted[rows])

    def first(self, windows: int) -> RecoveryText:
        """Return the first windows."""
        return self.rows(slice(windows))

    def share(self, group: Group) -> RecoveryText:
        """Return the windows of this process; windows go to the processes in turn."""
        return self.rows(slice(group.rank, None, group.size))

    def weights(self, rows: slice | torch.Tensor) -> torch.Tensor | None:
        """Return which predictions of some windows count: (b, t − 1) bool, or ``None`` for all."""
        return None if self.counted is None else self.counted[rows, 1:]


@dataclass(frozen=True)
class Distance:
    """How far a model is from the dense one on a text; all in nats per predicted token.

    Attributes:
        kl: mean KL(dense ‖ model).
        loss, dense_loss: mean negative log-likelihood of the model and of the dense one.
    """

    kl: float
    loss: float
    dense_loss: float


class Saved(ABC):
    """Where a level keeps finished parts of its work, so that a killed run resumes; implemented by the stage."""

    @abstractmethod
    def part(self, name: str) -> Path | None:
        """Return the safetensors file of a finished part, or ``None``."""

    @abstractmethod
    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Store a finished part: tensors, and JSON data that :meth:`values` returns."""

    @abstractmethod
    def values(self, name: str) -> dict[str, Any]:
        """Return the JSON data of a finished part."""

    @abstractmethod
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the last :meth:`save_state` of an interrupted run of this level, or ``None``."""

    @abstractmethod
    def save_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Store the state of unfinished work in place of the previous one."""

    @abstractmethod
    def log_file(self, name: str) -> Path:
        """Return the path of a log file in the result; logs contain times and have no checksum.

        Only in the process that writes.
        """

    @abstractmethod
    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill an empty folder of the result, beside the checkpoint; a resumed run keeps it."""


# Outputs of a block for all windows that a level has at once, at most. In each model: those that the present block
# starts from, and those of the present block, before and after it is changed.
OUTPUT_SETS = 2 * 3


@dataclass(frozen=True)
class Passes:
    """How both models are read block by block.

    Attributes:
        independent: whether passes may start at every block, see :func:`ara.models.blocks.independent_starts`.
        keep: of the tensors in outputs of blocks.
    """

    independent: bool
    keep: Keep = in_memory

    def stream(self, model: nn.Module, ids: torch.Tensor, batch_size: int | list[int]) -> Stream:
        """Return the stream of a model over windows (w, t) int64; ``batch_size`` per pass, or of each pass."""
        return Stream(model, ids, batch_size, self.independent, self.keep)


@dataclass
class Recovery:
    """What a level works on.

    Attributes:
        dense: the dense model, in evaluation mode; no parameter requires a gradient, and none may change.
        model: the compressed model, in evaluation mode, changed in place. Its low-rank layers are
            two balanced factors each (:mod:`ara.recovery.trainable`), whatever the checkpoint's layout. Rounded
            matrices have trainable scales instead (:mod:`ara.recovery.rounded`).
        specs: the factorised layers, low-rank or dense, in the order of the model.
        factors: module path → safetensors file with ``<path>.A`` (s, n) and ``<path>.B`` (m, s); s = r for all ranks.
        train: text that the level learns from.
        held_out: text that the level chooses by; shares no window with ``train``.
        unseen: text that no level reads; the stage judges by it.
        config: settings of all levels, with resolved device and dtype.
        saved: finished parts of an interrupted run.
        report: progress.
        keep_on_interrupt: on Ctrl+C a level returns what it has finished, instead of raising ``KeyboardInterrupt``.
        stored: of a rounded model, how its parameters will be stored, by name.
        folder: for outputs and inputs of blocks that do not fit into memory; ``None``: they stay there.
        group: processes that share the work. Each has all windows and both models, which stay equal; every text has at
            least as many windows as there are processes.
    """

    dense: PreTrainedModel
    model: PreTrainedModel
    specs: Sequence[LinearSpec]
    factors: Mapping[str, Path]
    train: RecoveryText
    held_out: RecoveryText
    unseen: RecoveryText
    config: RecoverConfig
    saved: Saved
    report: Reporter = SILENT
    keep_on_interrupt: bool = False
    stored: Mapping[str, Stored] = field(default_factory=dict)
    folder: Path | None = None
    group: Group = ALONE

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        device: torch.device = self.model.device
        return device

    def passes(self) -> Passes:
        """Return how both models are read block by block; report if passes take longer, or outputs go into files."""
        keeper = Keeper(self.folder, self.report)
        width = self.model.get_input_embeddings().weight.shape[1]
        tokens = self.train.share(self.group).tokens + self.held_out.share(self.group).tokens
        keeper.place(OUTPUT_SETS * tokens * width * self.model.dtype.itemsize)
        return Passes(self._starts_anywhere(), keeper.keep)

    def _starts_anywhere(self) -> bool:
        """Tell whether passes of both models may start at every block; if not, it is reported."""
        starts = range(1, len(find_blocks(self.model)[1]))
        ids = self.train.ids[:1].to(self.device)
        found = all(len(independent_starts(one, ids, starts)) == len(starts) for one in (self.dense, self.model))
        independent: bool = self.group.broadcast(found)
        if not independent:
            self.report.fact(
                "every pass starts at the embeddings, which takes longer: blocks of this model reuse results of "
                "earlier blocks"
            )
        return independent

    def optimiser(
        self, parameters: Mapping[str, nn.Parameter], steps: int, rate: float, method: Method = "adamw"
    ) -> MasterOptimiser:
        """Return the optimiser of parameters of the compressed model by their name; see :class:`MasterOptimiser`."""
        return MasterOptimiser(parameters, steps, rate, self.stored, method, self.group)

    def unseen_distance(self, advance: Callable[[int], None] | None = None) -> Distance:
        """Return how far the compressed model is from the dense one on the unseen windows, in all processes.

        Raises:
            NumericalError: a figure is NaN or infinite.
        """
        return distance(self.dense, self.model, self.unseen, self.config.batch_size, advance, self.group)


@dataclass(frozen=True)
class LevelOutcome:
    """What a level has done.

    Attributes:
        tokens: training tokens read, each pass counted.
        notes: figures of the level, in words.
        interrupted: why it ended early; ``None`` if it is complete.
        details: further figures as JSON data.
        adapter: KL on the unseen windows with the adapter that the level has written beside unchanged weights; ``None``
            if it has changed the weights.
    """

    tokens: int
    notes: tuple[str, ...] = ()
    interrupted: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    adapter: float | None = None


class Level(ABC):
    """One level of recovery.

    The stage takes care of the rest: it measures the divergence from the dense model on unseen text before and after,
    takes the level back if it has grown, stores the state after each level, and writes the checkpoint.

    Class attributes:
        settings: fields of :class:`~ara.config.RecoverConfig` that no other level reads.
        less_memory: which options need less memory, for an error.
        not_rounded: why the level cannot repair a rounded checkpoint, in words; ``None`` if it can.
        all_ranks: whether the level needs the factors of all ranks.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    less_memory: ClassVar[str] = "a smaller --batch-size, or fewer --samples"
    not_rounded: ClassVar[str | None] = None
    all_ranks: ClassVar[bool] = False

    def check(self, config: RecoverConfig) -> None:  # noqa: B027 - most levels have nothing to refuse
        """Refuse settings that the level cannot fulfil, before anything is loaded.

        Raises:
            AraError: a package is missing, or settings contradict each other.
        """

    def check_rounded(self, config: RecoverConfig) -> None:  # noqa: B027 - most levels have nothing to refuse
        """Refuse settings that the level cannot fulfil for a rounded checkpoint.

        Raises:
            UsageError: they make no sense there.
        """

    def beside_weights(self, config: RecoverConfig, parameters: int) -> int | None:
        """Return the bytes that the level needs at least beside all weights of the compressed model.

        Args:
            config: settings.
            parameters: number of parameters in the decoder blocks.

        Returns:
            ``None`` if the level changes one block at a time, so that the others need not be in memory.
        """
        return None

    def windows(self, config: RecoverConfig) -> int:
        """Return how many windows the level learns from. No other level reads them if the text is long enough."""
        return config.samples

    @abstractmethod
    def repair(self, recovery: Recovery) -> LevelOutcome:
        """Repair ``recovery.model`` in place.

        It must not become worse on the held-out windows by much: levels with steps keep the best state.

        Raises:
            NumericalError: NaN or divergence.
        """


@torch.inference_mode()
def distance(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    text: RecoveryText,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> Distance:
    """Return how far ``model`` is from ``dense`` on a text. All tokens count, also in a training on answers alone.

    Args:
        dense: the dense model.
        model: the other one.
        text: windows.
        batch_size: windows per pass.
        advance: called with the number of windows that this process has read.
        group: processes that share the windows; all get the result.

    Raises:
        NumericalError: a figure is NaN or infinite.
    """
    # Per window: divergence, loss, loss of the dense model; sums.
    values = torch.zeros(3, len(text.ids), dtype=torch.float64)
    heads = Head(dense), Head(model)
    for rows in torch.arange(group.rank, len(text.ids), group.size).split(batch_size):
        ids = text.ids[rows].to(model.device)
        reference, scores = (head.scores(ids) for head in heads)
        for logits, place in scores.chunks():
            targets, expected = place.of(ids[:, 1:]), reference.at(place)
            own = rows[place.windows]
            values[0, own] += losses_at(logits, targets, expected).double().sum(1).cpu()
            values[1, own] += summed_nll(logits, targets)
            values[2, own] += summed_nll(expected, targets)
        if advance is not None:
            advance(len(rows))
    values /= text.ids.shape[1] - 1
    group.total([values])
    found = Distance(*(float(row.mean()) for row in values))
    if not all(map(math.isfinite, (found.kl, found.loss, found.dense_loss))):
        raise NumericalError(
            f"on held-out text the losses are {found.dense_loss} (dense) and {found.loss} (compressed), "
            f"the divergence is {found.kl}",
            "try --dtype float32 or a higher --keep",
        )
    return found
