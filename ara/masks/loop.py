"""The training loop of all mask families: batches, optimiser, held-out checks, log, checkpoints.

A step applies the family's cut to the model and takes the gradient of the language model's loss for every component
(:meth:`ara.masks.model.MaskedModel.gradients`). From it follows the gradient of the family's parameters: that of
Σ_i ⟨p_i, ∂L/∂p_i⟩ with ∂L/∂p fixed equals that of L. A step depends only on the seed, its number and the saved state,
so a resumed training is bit for bit the same as an uninterrupted one.
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
from ara.masks.optimisers import optimiser_for
from ara.masks.state import LogRow, TrainingSettings, TrainingState
from ara.models.training import SEED_STRIDE, batch_indices, check_divergence
from ara.progress import SILENT, Reporter
from ara.solver.problem import Allocation

_DIVERGED_HINT = "lower the step size (--rate, --trust, --learning-rate), or use more windows per step (--batch)"


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
        family: the masks, at their start.
        model: the model.
        windows: (w, t) int64 calibration windows.
        held_out: (w, t) int64 windows for the checks; none of ``windows``.
        settings: steps, batches, loss and checks.
        state: resume from this state.
        save: called with the state after every step.
        keep_on_interrupt: on Ctrl+C return the state reached, instead of raising ``KeyboardInterrupt``.
        report: progress.
        label: of the progress bar.

    Returns:
        The final state; ``best`` is the allocation to use, never worse on ``held_out`` than the start.

    Raises:
        NumericalError: the loss is NaN, or the training diverges.
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
                report.fact(_progress(row, settings.steps, state.best_held_out))
                # Some masks start with all components, and the losses of their batches must grow.
                checks = [row.held_out for row in state.log if row.held_out is not None]
                check_divergence(checks, _DIVERGED_HINT)
                if save is not None:
                    save(state)
                bar.advance()
    except KeyboardInterrupt:
        if not keep_on_interrupt or not state.log:
            raise
        # A step without its log row does not count: the next run repeats it.
        state.step, state.interrupted = state.log[-1].step, True
    finally:
        model.use_dense()
    return state


class _Loop:
    """The steps of one training, and what they share."""

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
        self.optimiser = optimiser_for(family, settings, state)
        # Time and passes of earlier runs count.
        self.clock = time.monotonic() - state.seconds
        self.passes = model.backward_passes - state.backward_passes

    def start(self) -> None:
        """Check the starting allocation and log it as row 0."""
        value = self.check()
        if not math.isfinite(value):
            raise NumericalError(
                f"the starting allocation gives a held-out loss of {value}",
                "the model computes NaN or infinity: try --dtype float32 or a higher --keep",
            )
        best = Allocation.of_ranks(self.family.specs, self.state.best, self.family.budget)
        self.state.log.append(self._row(None, best, value))

    def step(self) -> LogRow:
        """Take one step and return its log row."""
        settings, state = self.settings, self.state
        batch = self.windows[batch_indices(len(self.windows), settings.batch, state.step, settings.seed)]
        seed, progress = settings.seed * SEED_STRIDE + state.step, state.step / settings.steps
        cut = self.family.cut(progress, torch.Generator().manual_seed(seed))
        if cut.ranks is None:
            self.model.use_soft(cut.masks)
        else:
            self.model.use(cut.ranks)
        gradients = self.model.gradients(batch, settings.loss, settings.micro_batch, seed)
        self.optimiser.step(cut, gradients, progress)
        state.step += 1
        allocation = self.family.allocation()
        due = state.step == settings.steps or state.step % settings.check_every == 0
        row = self._row(gradients.loss, allocation, self.check() if due else None)
        state.log.append(row)
        state.seconds = row.seconds
        state.backward_passes = self.model.backward_passes - self.passes
        state.tensors = self.optimiser.state()
        return row

    def check(self) -> float:
        """Return the held-out loss of the current allocation; note it if it is the best one."""
        family, state = self.family, self.state
        with self.optimiser.averaged():
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

    def _row(self, loss: float | None, allocation: Allocation, held_out: float | None) -> LogRow:
        keep, seconds = allocation.keep(self.model.specs), time.monotonic() - self.clock
        return LogRow(self.state.step, loss, keep, allocation.dense_count(), seconds, held_out)


def trained_allocation(family: MaskFamily, context: TuningContext, options: MethodOptions, label: str) -> Allocation:
    """Train ``family`` on the windows of ``context`` and return the best allocation on the held-out windows."""
    settings = TrainingSettings.of(options, context.batch_size, context.seed)
    state = train(family, context.model, context.train, context.held_out, settings, report=context.report, label=label)
    return Allocation.of_ranks(family.specs, state.best, family.budget)


def _progress(row: LogRow, steps: int, best: float) -> str:
    parts = [f"step {row.step} of {steps}: loss {row.loss:.4f}", f"keep {row.keep:.2%}", f"{row.dense} dense"]
    if row.held_out is not None:
        parts.append(f"held-out {row.held_out:.4f} (best {best:.4f})")
    return ", ".join(parts)
