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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from ara.allocation.base import Allocation, Context
from ara.config import MethodOptions
from ara.errors import NumericalError
from ara.masks.family import Cut, MaskFamily
from ara.masks.model import LossKind, MaskedModel, MaskGradients
from ara.progress import SILENT, Reporter

# Held-out losses this much above the start's, in nats per token, in as many checks in a row, are divergence.
_DIVERGED_NATS = 2.0
_DIVERGED_CHECKS = 2
# In front of the names of the best parameters in a checkpoint.
_BEST = "best:"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; see :class:`ara.config.TrainMasksConfig` for ranges.

    Attributes:
        steps: optimiser steps.
        batch: windows per step.
        learning_rate: of Adam at the start; falls along a cosine to a tenth.
        loss: of the language model.
        average: decay of the moving average of the parameters that is checked and deployed; 0 takes the last ones.
        check_every: steps between checks on held-out text.
        micro_batch: windows per forward and backward pass.
        seed: of batches and of everything random.
    """

    steps: int
    batch: int
    learning_rate: float
    loss: LossKind = "kl"
    average: float = 0.0
    check_every: int = 10
    micro_batch: int = 4
    seed: int = 0

    @classmethod
    def of(cls, options: MethodOptions, micro_batch: int, seed: int) -> TrainingSettings:
        """Return the settings that a method's ``options`` name; by default where they do not."""
        named = {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        assert not {"micro_batch", "seed"} & set(named), "these are the context's"
        return cls(**named, micro_batch=micro_batch, seed=seed)


@dataclass
class LogRow:
    """One step; row 0 is the start. Losses in nats per token, ``seconds`` since the start.

    Attributes:
        loss: of the step's batch; ``None`` in row 0.
        keep: fraction of the dense parameters that the allocation reached keeps.
        dense: layers that it leaves dense.
        held_out: where the allocation was checked on held-out text.
    """

    step: int
    loss: float | None
    keep: float
    dense: int
    seconds: float
    held_out: float | None = None


@dataclass
class TrainingState:
    """Everything that a training goes on from.

    Attributes:
        step: finished steps.
        tensors: parameters, their average and the optimiser's moments, by name.
        best: ranks of the best allocation on held-out text so far.
        best_held_out: its mean negative log-likelihood, nats per token.
        best_step: the step after which it was reached; 0 is the start.
        best_tensors: the family's parameters that gave it, by name.
        log: one row per step; row 0 is the start.
        seconds: of training so far.
        backward_passes: windows through a backward pass so far.
        interrupted: whether Ctrl+C ended it.
    """

    step: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    best: dict[str, int | None] = field(default_factory=dict)
    best_held_out: float = math.inf
    best_step: int = 0
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    log: list[LogRow] = field(default_factory=list)
    seconds: float = 0.0
    backward_passes: int = 0
    interrupted: bool = False

    def plain(self) -> dict[str, Any]:
        """Return all but the tensors as JSON data."""
        values = asdict(replace(self, tensors={}, best_tensors={}))
        del values["tensors"], values["best_tensors"]
        return values

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors under one set of names, for a checkpoint."""
        return {**self.tensors, **{f"{_BEST}{name}": value for name, value in self.best_tensors.items()}}

    @classmethod
    def from_plain(cls, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TrainingState:
        """Return the state that :meth:`plain` and :meth:`all_tensors` describe."""
        best = {name.removeprefix(_BEST): value for name, value in tensors.items() if name.startswith(_BEST)}
        rest = {name: value for name, value in tensors.items() if not name.startswith(_BEST)}
        return cls(**{**values, "log": [LogRow(**row) for row in values["log"]]}, tensors=rest, best_tensors=best)


def batch_indices(count: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return which of ``count`` windows step number ``step`` reads: every window once, in random order, then again."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
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
    learner = (_OwnStep if family.own_step else _Adam)(family, settings, state)
    specs, dense_cost = model.specs, sum(spec.dense_cost for spec in model.specs)
    clock = time.monotonic() - state.seconds
    passes = model.backward_passes - state.backward_passes

    def check() -> float:
        """Compare the present allocation with the best one, on held-out text."""
        with learner.averaged():
            allocation: Allocation = family.allocation()
            parameters = {name: value.detach().clone() for name, value in family.parameters.items()}
        if dict(allocation.ranks) == state.best:
            return state.best_held_out
        model.use(allocation.ranks)
        value = float(model.nll(held_out, settings.micro_batch).mean())
        # NaN is never better.
        if value < state.best_held_out:
            state.best, state.best_held_out, state.best_step = dict(allocation.ranks), value, state.step
            state.best_tensors = parameters
        return value

    try:
        with report.bar(label, settings.steps) as bar:
            bar.advance(state.step)
            if not state.log:
                value = check()
                if not math.isfinite(value):
                    raise NumericalError(
                        f"the allocation to start from gives a held-out loss of {value}",
                        "the model computes NaN or infinity: try --dtype float32 or a higher --keep",
                    )
                start = Allocation(state.best)
                state.log.append(
                    LogRow(0, None, start.keep(specs), start.dense_count(), time.monotonic() - clock, value)
                )
            while state.step < settings.steps:
                batch = windows[batch_indices(len(windows), settings.batch, state.step, settings.seed)]
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + state.step)
                cut = family.cut(state.step / settings.steps, generator)
                if cut.ranks is None:
                    model.use_soft(cut.masks)
                else:
                    model.use(cut.ranks)
                seed = settings.seed * 1_000_003 + state.step
                found = model.gradients(batch, settings.loss, settings.micro_batch, seed)
                learner.learn(cut, found, state.step / settings.steps)
                state.step += 1
                last = state.step == settings.steps
                allocation = family.allocation()
                row = LogRow(state.step, found.loss, allocation.cost(specs) / dense_cost, allocation.dense_count(), 0.0)
                if last or state.step % settings.check_every == 0:
                    row.held_out = check()
                report.fact(_told(row, settings.steps, state.best_held_out))
                row.seconds = state.seconds = time.monotonic() - clock
                state.backward_passes = model.backward_passes - passes
                state.log.append(row)
                state.tensors = learner.state()
                _refuse_divergence(state.log)
                if save is not None:
                    save(state)
                bar.advance()
    except KeyboardInterrupt:
        if not keep_on_interrupt or not state.best:
            raise
        report.warn(f"interrupted after step {state.step} of {settings.steps}: keeping the best allocation so far")
        state.interrupted = True
    finally:
        model.use_dense()
    return state


def trained_allocation(family: MaskFamily, context: Context, options: MethodOptions, label: str) -> Allocation:
    """Train ``family`` as ``options`` say on the windows of ``context``; returns its best on the held-out ones."""
    settings = TrainingSettings.of(options, context.batch_size, context.seed)
    state = train(family, context.model, context.train, context.held_out, settings, report=context.report, label=label)
    return Allocation(state.best)


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


class _OwnStep:
    """Lets the family move its parameters, and remembers them."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family = family
        for name, value in family.parameters.items():
            if state.tensors:
                value.copy_(state.tensors[name])

    def learn(self, cut: Cut, found: MaskGradients, progress: float) -> None:
        """Take one step."""
        self.family.update(found, progress)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are those to deploy: as they are."""
        return nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of everything that the next step depends on."""
        return {name: value.clone() for name, value in self.family.parameters.items()}


class _Adam:
    """Adam (arXiv 1412.6980) with a cosine schedule, and a moving average of the parameters."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family, self.parameters, self.settings = family, family.parameters, settings
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99))
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        if state.tensors:
            self._restore(state)

    def learn(self, cut: Cut, found: MaskGradients, progress: float) -> None:
        """Take one step along the gradient of the masks and of the family's penalty."""
        loss = torch.stack([(cut.masks[name] * gradient).sum() for name, gradient in found.masks.items()]).sum()
        penalty = self.family.penalty()
        if penalty is not None:
            loss = loss + penalty
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        for name, value in self.parameters.items():
            self.average[name].lerp_(value.detach(), 1 - self.settings.average)

    def averaged(self) -> _Swapped:
        """Return a context in which the parameters hold their averages."""
        return _Swapped(self.parameters, self.average)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of everything that the next step depends on."""
        tensors: dict[str, torch.Tensor] = {}
        for name, value in self.parameters.items():
            moments = self.optimiser.state[value]
            tensors[f"{name}.value"] = value.detach().clone()
            tensors[f"{name}.average"] = self.average[name].clone()
            tensors[f"{name}.exp_avg"] = moments["exp_avg"].clone()
            tensors[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"].clone()
        return tensors

    def _restore(self, state: TrainingState) -> None:
        for name, value in self.parameters.items():
            with torch.no_grad():
                value.copy_(state.tensors[f"{name}.value"])
            self.average[name] = state.tensors[f"{name}.average"].clone()
            self.optimiser.state[value] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"{name}.exp_avg"].clone(),
                "exp_avg_sq": state.tensors[f"{name}.exp_avg_sq"].clone(),
            }


class _Swapped:
    """Puts other values into leaf tensors, and back."""

    def __init__(self, parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
        self.parameters, self.values = parameters, values
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, value in self.parameters.items():
            self.kept[name] = value.detach().clone()
            value.copy_(self.values[name])

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name, value in self.parameters.items():
            value.copy_(self.kept[name])
