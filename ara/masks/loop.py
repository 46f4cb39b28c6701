"""The training loop that all learned masks share: batches, optimiser, held-out checks, log, checkpoints.

A step cuts the model as the family says, takes the gradient of the language model's loss at every component
(:meth:`ara.masks.model.MaskedModel.gradients`), and carries it on to the family's parameters: the gradient of
Σ_i ⟨p_i, ∂L/∂p_i⟩ with ∂L/∂p held fixed is that of L. Everything that a step depends on is a function of the seed, the
step's number and the saved state, so a resumed training continues bit by bit as if it had not been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from ara.config import MethodOptions
from ara.errors import NumericalError
from ara.masks.context import TuningContext
from ara.masks.mask_family import MaskFamily
from ara.masks.model import MaskedModel
from ara.masks.optimisers import learner_of
from ara.masks.state import LogRow, TrainingSettings, TrainingState
from ara.progress import SILENT, Reporter
from ara.solver.problem import Allocation

# Held-out losses this much above the start's, in nats per token, in as many checks in a row, are divergence.
_DIVERGED_NATS = 2.0
_DIVERGED_CHECKS = 2
# Between the seeds of trainings; more than any of them has steps or epochs.
_SEED_STRIDE = 1_000_003


def batch_indices(count: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return which of ``count`` windows step number ``step`` reads: every window once, in random order, then again."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + epoch)
        indices.append(int(torch.randperm(count, generator=generator)[place]))
    return torch.tensor(indices)


def train(
    family: MaskFamily,
    model: MaskedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    settings: TrainingSettings,
    *,
    state: TrainingState | None = None,
    save: Callable[[TrainingState], None] | None = None,
    keep_on_interrupt: bool = False,
    report: Reporter = SILENT,
    label: str = "Training masks",
) -> TrainingState:
    """Train ``family`` on ``windows``; the model is left dense.

    Args:
        family: what is trained.
        model: the model.
        windows: (w, t) int64 calibration windows.
        held_out: (w, t) int64 windows for the checks; none of ``windows``.
        settings: how.
        state: go on from here instead of from the family's start.
        save: called after every step with the state.
        keep_on_interrupt: let Ctrl+C end the training as if it were over, instead of passing it on.
        report: told of progress.
        label: of the bar.

    Returns:
        The final state; ``best`` is the allocation to use, never worse on ``held_out`` than the start.

    Raises:
        NumericalError: the loss is NaN, or has grown beyond all measure.
    """
    state = state or TrainingState()
    loop = _Loop(family, model, windows, held_out, settings, state)
    try:
        with report.bar(label, settings.steps) as bar:
            bar.advance(state.step)
            if not state.log:
                loop.start()
            while state.step < settings.steps:
                row = loop.step()
                report.fact(_told(row, settings.steps, state.best_held_out))
                _refuse_divergence(state.log)
                if save is not None:
                    save(state)
                bar.advance()
    except KeyboardInterrupt:
        if not keep_on_interrupt or not state.log:
            raise
        # A step whose check was cut off does not count: the next run takes it again.
        state.step, state.interrupted = state.log[-1].step, True
    finally:
        model.use_dense()
    return state


class _Loop:
    """One training: what its steps share."""

    def __init__(
        self,
        family: MaskFamily,
        model: MaskedModel,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        settings: TrainingSettings,
        state: TrainingState,
    ) -> None:
        self.family, self.model, self.windows, self.held_out = family, model, windows, held_out
        self.settings, self.state = settings, state
        self.learner = learner_of(family, settings, state)
        # A resumed training counts on from what it had.
        self.clock = time.monotonic() - state.seconds
        self.passes = model.backward_passes - state.backward_passes

    def start(self) -> None:
        """Judge the allocation to start from: row 0 of the log."""
        value = self.check()
        if not math.isfinite(value):
            raise NumericalError(
                f"the allocation to start from gives a held-out loss of {value}",
                "the model computes NaN or infinity: try --dtype float32 or a higher --keep",
            )
        self.state.log.append(self._row(None, self.best(), value))

    def step(self) -> LogRow:
        """Take one step; returns its row of the log."""
        settings, state = self.settings, self.state
        batch = self.windows[batch_indices(len(self.windows), settings.batch, state.step, settings.seed)]
        seed, progress = settings.seed * _SEED_STRIDE + state.step, state.step / settings.steps
        cut = self.family.cut(progress, torch.Generator().manual_seed(seed))
        if cut.ranks is None:
            self.model.use_soft(cut.masks)
        else:
            self.model.use(cut.ranks)
        found = self.model.gradients(batch, settings.loss, settings.micro_batch, seed)
        self.learner.learn(cut, found, progress)
        state.step += 1
        allocation = self.family.allocation()
        looked = state.step == settings.steps or state.step % settings.check_every == 0
        row = self._row(found.loss, allocation, self.check() if looked else None)
        state.log.append(row)
        state.seconds = row.seconds
        state.backward_passes = self.model.backward_passes - self.passes
        state.tensors = self.learner.state()
        return row

    def check(self) -> float:
        """Compare the present allocation with the best one, on held-out text; returns its loss."""
        family, state = self.family, self.state
        with self.learner.averaged():
            allocation = family.allocation()
            parameters = {name: value.detach().clone() for name, value in family.parameters.items()}
        if dict(allocation.ranks) == state.best:
            return state.best_held_out
        self.model.use(allocation.ranks)
        value = float(self.model.nll(self.held_out, self.settings.micro_batch).mean())
        # NaN is never better.
        if value < state.best_held_out:
            state.best, state.best_held_out, state.best_step = dict(allocation.ranks), value, state.step
            state.best_tensors = parameters
        return value

    def best(self) -> Allocation:
        """Return the best allocation on held-out text so far."""
        return Allocation.of_ranks(self.family.specs, self.state.best, self.family.budget)

    def _row(self, loss: float | None, allocation: Allocation, held_out: float | None) -> LogRow:
        keep, seconds = allocation.keep(self.model.specs), time.monotonic() - self.clock
        return LogRow(self.state.step, loss, keep, allocation.dense_count(), seconds, held_out)


def trained_allocation(family: MaskFamily, context: TuningContext, options: MethodOptions, label: str) -> Allocation:
    """Train ``family`` as ``options`` say on the windows of ``context``; returns its best on the held-out ones."""
    settings = TrainingSettings.of(options, context.batch_size, context.seed)
    state = train(family, context.model, context.train, context.held_out, settings, report=context.report, label=label)
    return Allocation.of_ranks(family.specs, state.best, family.budget)


def _told(row: LogRow, steps: int, best: float) -> str:
    words = [f"step {row.step} of {steps}: loss {row.loss:.4f}", f"keep {row.keep:.2%}", f"{row.dense} dense"]
    if row.held_out is not None:
        words.append(f"held-out {row.held_out:.4f} (best {best:.4f})")
    return ", ".join(words)


def _refuse_divergence(log: list[LogRow]) -> None:
    # What may be deployed is judged, not the loss of the batches: some masks set out from all components.
    checks = [row.held_out for row in log if row.held_out is not None]
    grown = min((value - checks[0] for value in checks[1:][-_DIVERGED_CHECKS:]), default=0.0)
    if len(checks) > _DIVERGED_CHECKS and grown > _DIVERGED_NATS:
        raise NumericalError(
            f"the training diverges: the held-out loss has grown by {grown:.1f} nats per token since its start",
            "lower the step size (--rate, --trust, --learning-rate), or use more windows per step (--batch)",
        )
