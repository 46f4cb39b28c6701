"""Block training: every block of the compressed model learns to give the output of the dense block.

Of a rounded block, θ are the scales of its matrices, and its norms, biases and matrices that are not rounded.

For block i with parameters θ, over counted tokens t of the training windows,

    minimise  Σ_t e_tᵀ M e_t,   e_t = block_θ(x'_t) − dense block(x_t)

x is the dense stream, x' that of the compressed model, whose earlier blocks have been trained. With look-ahead the same
error at the output of the next dense block, which reads the compressed block's output, is added. M is the identity
(``plain``), the Fisher information of the residual stream (``full``), or its diagonal (``channels``).

Each term is divided by its held-out value at the start of the block. So the loss starts near 1 for every block and
metric, and clipping and divergence mean the same everywhere; Adam itself does not depend on the scale.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from ara.environment import trim_heap
from ara.errors import NAN_HINT, NumericalError, UnsupportedModelError
from ara.models.weights import find_blocks
from ara.recovery.base import Level, LevelOutcome, Recovery
from ara.recovery.fisher import block_fisher
from ara.recovery.metric import Metric
from ara.recovery.optimiser import trained
from ara.recovery.side_by_side import Errors, SideBySide
from ara.recovery.trainable import block_tensors, load_tensors

# Share of the training windows that the Fisher information is read from; a mean over tokens needs fewer than training.
_FISHER_SHARE = 0.25
_FISHER_PART = "block-fisher"
# A held-out error that has grown this many times is a divergence; one that has grown less is taken back.
_DIVERGED = 10.0


class Block(Level):
    """Trains block by block; a block that does not get better on held-out text is taken back."""

    settings = frozenset({"block_epochs", "block_rate", "block_metric", "look_ahead"})

    def repair(self, recovery: Recovery) -> LevelOutcome:
        """Train all blocks in their order.

        ``tokens`` of the outcome counts each pass over the text once, though every block reads it.

        Raises:
            NumericalError: NaN or divergence.
            UnsupportedModelError: look-ahead for a model whose blocks cannot run apart.
        """
        training = _Training(recovery)
        interrupted = None
        try:
            training.run()
        except KeyboardInterrupt:
            if not recovery.keep_on_interrupt:
                raise
            interrupted = f"interrupted after block {len(training.records)} of {training.blocks}"
        finally:
            recovery.model.requires_grad_(False)
        return training.outcome(interrupted)


class _Training:
    """The training of all blocks.

    Attributes:
        blocks: number of blocks.
        records: figures of the finished blocks.
    """

    def __init__(self, recovery: Recovery) -> None:
        self.recovery, self.config = recovery, recovery.config
        self._path, modules = find_blocks(recovery.model)
        self.blocks = len(modules)
        self.records: list[dict[str, Any]] = []
        self._steps = self.config.block_epochs * -(-len(recovery.train.ids) // self.config.batch_size)

    def run(self) -> None:
        """Train the blocks in their order; finished ones are loaded."""
        train, held_out = self._streams()
        metrics = self._metrics()
        with self.recovery.report.bar("Training blocks", self.blocks * self._steps) as bar:
            for index in range(self.blocks):
                train.aim()
                held_out.aim()
                if self._load(index):
                    bar.advance(self._steps)
                    outputs = held_out.outputs()
                else:
                    outputs = self._train(index, train, held_out, metrics[index : index + 2], bar.advance)
                if index + 1 < self.blocks:
                    train.advance(train.outputs())
                    held_out.advance(outputs)
                trim_heap()

    def outcome(self, interrupted: str | None) -> LevelOutcome:
        """Report the figures of the finished blocks."""
        notes: tuple[str, ...] = ()
        if self.records:
            lower = 1 - statistics.median(record["ratio"] for record in self.records)
            back = sum(not record["kept"] for record in self.records)
            notes = (
                f"held-out error of block outputs {lower:.1%} lower (median of {len(self.records)} blocks)",
                f"{back} of {len(self.records)} blocks taken back",
            )
            self.recovery.report.fact("; ".join(notes))
        tokens = self.config.block_epochs * self.recovery.train.tokens if self.records else 0
        return LevelOutcome(tokens, notes, interrupted, {"blocks": self.records})

    def _streams(self) -> tuple[SideBySide, SideBySide]:
        """Return both models side by side on the training text and on the held-out text."""
        recovery = self.recovery
        passes = recovery.passes()
        if not passes.independent and self.config.look_ahead:
            raise UnsupportedModelError(
                "look-ahead runs a dense block by itself, but blocks of this model reuse results of earlier blocks",
                "leave out --look-ahead",
            )
        train, held_out = (
            SideBySide(
                recovery.dense,
                recovery.model,
                text,
                self.config.batch_size,
                passes,
                self.config.look_ahead,
                recovery.group,
            )
            for text in (recovery.train, recovery.held_out)
        )
        return train, held_out

    def _metrics(self) -> list[Metric]:
        """Return the metric of every block; the Fisher information is read once and stored."""
        recovery, config = self.recovery, self.config
        if config.block_metric == "plain":
            return [Metric(None, recovery.device)] * self.blocks
        path = recovery.saved.part(_FISHER_PART)
        if path is None:
            text = recovery.train.first(max(1, round(_FISHER_SHARE * len(recovery.train.ids))))
            full = config.block_metric == "full"
            fisher = block_fisher(
                recovery.dense,
                text,
                config.batch_size,
                full=full,
                seed=config.seed,
                report=recovery.report,
                folder=recovery.folder,
                group=recovery.group,
            )
            stored = {f"{index:03d}": information for index, information in enumerate(fisher)}
            recovery.saved.finish_part(_FISHER_PART, stored, {})
        else:
            stored = load_file(path)
        return [Metric(stored[f"{index:03d}"], recovery.device) for index in range(self.blocks)]

    def _load(self, index: int) -> bool:
        """Load a block that an interrupted run has finished; tell whether there is one."""
        path = self.recovery.saved.part(_part(index))
        if path is None:
            return False
        load_tensors(self.recovery.model, load_file(path))
        self.records.append(self.recovery.saved.values(_part(index)))
        return True

    def _train(
        self,
        index: int,
        train: SideBySide,
        held_out: SideBySide,
        metrics: Sequence[Metric],
        advance: Callable[[int], None],
    ) -> list[Any]:
        """Train one block, keep the better state, store it, and return its outputs on the held-out text."""
        name = f"{self._path}.{index}"
        before = after = held_out.measure(metrics)
        if not before.finite:
            raise NumericalError(f"the outputs of {name} hold NaN or infinity before it is trained", NAN_HINT)
        block = self.recovery.model.get_submodule(name)
        start = {key: tensor.clone() for key, tensor in block.state_dict().items()}
        try:
            if min(before.forms) > 0:
                self._fit(index, name, train, metrics, before, advance)
                after = held_out.measure(metrics)
            ratio = self._ratio(name, before, after)
        except BaseException as error:
            block.load_state_dict(start)
            if isinstance(error, NumericalError):
                raise NumericalError(f"training {name}: {error}", error.hint) from error
            raise
        kept = after is before or ratio < 1
        if not kept:
            block.load_state_dict(start)
        scale = held_out.scale(metrics[0]) or 1.0
        found = {"before": before.forms[0] / scale, "after": after.forms[0] / scale}
        self.records.append({**found, "ratio": ratio if kept else 1.0, "kept": kept})
        self.recovery.saved.finish_part(_part(index), block_tensors(self.recovery.model, name), self.records[-1])
        return (after if kept else before).outputs

    def _fit(
        self,
        index: int,
        name: str,
        train: SideBySide,
        metrics: Sequence[Metric],
        before: Errors,
        advance: Callable[[int], None],
    ) -> None:
        """Take all steps on one block."""
        config, block = self.config, self.recovery.model.get_submodule(name)
        parameters = trained(block.named_parameters(prefix=name))
        optimiser = self.recovery.optimiser(parameters, self._steps, config.block_rate)
        for epoch in range(config.block_epochs):
            for batch in batch_order(len(train.counts), config.seed, index, epoch):
                if train.reads(batch):
                    with torch.enable_grad():
                        forms = train.forms(batch, metrics, train.run(batch))
                        terms = [form / first for form, first in zip(forms, before.forms, strict=True)]
                        loss = torch.stack(terms).mean() / train.counts[batch]
                    loss.backward()
                optimiser.step()
                advance(1)
        block.requires_grad_(False)

    def _ratio(self, name: str, before: Errors, after: Errors) -> float:
        """Return the held-out error after training over that before it.

        Raises:
            NumericalError: it is not finite, or the training has diverged.
        """
        ratio = after.relative_to(before) if after is not before else 1.0
        if not after.finite or ratio > _DIVERGED:
            raise NumericalError(
                f"the training diverges: the held-out error of its outputs is {ratio:.3g} times that of the start",
                "lower the learning rate with --block-rate, or repair with more text (--samples)",
            )
        return ratio


def batch_order(batches: int, seed: int, block: int, epoch: int) -> list[int]:
    """Return the order of the batches in one epoch of one block."""
    order = list(range(batches))
    random.Random(f"{seed} {block} {epoch}").shuffle(order)
    return order


def _part(index: int) -> str:
    return f"block-{index:03d}"
