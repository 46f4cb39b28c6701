"""The level ``distill``: the whole model is trained to give the predictions of the dense model.

    L = Σ_t KL(q_t ‖ p_t) / number of counted t,   q dense, p compressed (Hinton et al., arXiv 1503.02531, T = 1)

Both models stay in evaluation mode, without dropout. A step depends only on the seed, its number and the saved state.
So a resumed training is bit for bit the same as an uninterrupted one.

Several processes share the windows of every step and the held-out ones. Each has both models and the optimiser.

This is not transformers' ``Trainer``: its checkpoints (``optimizer.pt``, ``scheduler.pt``, ``rng_state.pth``) are
pickles, it has no float32 copies of half-precision weights, and it keeps the best weights only as a whole checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from ara import bounds
from ara.config import RecoverConfig
from ara.errors import DataError, ModelError, NumericalError, UsageError
from ara.events import event_writer_class
from ara.layouts.modeling_ara import CompressedLinear
from ara.models.recompute import Recomputation, choose_recomputation
from ara.models.scores import Head
from ara.models.training import batch_indices
from ara.models.weights import LinearSpec, find_blocks
from ara.recovery.base import Level, LevelOutcome, Recovery, RecoveryText
from ara.recovery.history import History, Row
from ara.recovery.lora import Adapters, in_stored_layout, peft
from ara.recovery.optimiser import Method, rate_at, trained
from ara.recovery.teacher import Teacher, divergence_from

ADAPTER_FOLDER = "adapter"
# Prefix of the best parameters in a saved state.
_BEST = "best:"
# The rate by default, and a limit of it per nat of held-out KL before the training: the nearer the dense model, the
# smaller the steps that still lead there (docs/lab-notes.md).
_RATE, _RATE_PER_NAT = 5e-5, 8.5e-5
# Float32 numbers per trained parameter: gradient, two moments, and the copies of half-precision weights.
_OPTIMISER_BYTES = 4 * 4
# At least: gradient, and the one moment of Muon.
_LEAST_OPTIMISER_BYTES = 2 * 4


class Distill(Level):
    """Trains all weights of the blocks, the factors alone, or LoRA adapters."""

    settings = frozenset(
        {"steps", "batch", "rate", "optimiser", "train", "lora_rank", "keep_adapter"}
        | {"check_every", "patience", "save_every", "tensorboard"}
    )
    less_memory = "--train lora, --level block, or a smaller --batch-size"

    def check(self, config: RecoverConfig) -> None:
        """Refuse missing packages and an adapter without LoRA; see :meth:`Level.check`."""
        if config.keep_adapter and config.train != "lora":
            raise UsageError(f"--keep-adapter needs --train lora, got --train {config.train}")
        if config.train == "lora":
            peft()
        if config.tensorboard:
            event_writer_class()

    def check_rounded(self, config: RecoverConfig) -> None:
        """Refuse to train factors, whose whole numbers stay; see :meth:`Level.check_rounded`."""
        if config.train != "all":
            raise UsageError(
                f"--train {config.train} changes all numbers of the factors, and those of a rounded checkpoint stay",
                "use --train all: it trains scales, norms, biases and matrices that are not rounded",
            )

    def beside_weights(self, config: RecoverConfig, parameters: int) -> int:
        """Return the least bytes of gradients and optimiser; see :meth:`Level.beside_weights`."""
        return 0 if config.train == "lora" else _LEAST_OPTIMISER_BYTES * parameters

    def windows(self, config: RecoverConfig) -> int:
        """Return the windows of all steps: none is read twice if the text is long enough."""
        return config.steps * config.batch

    def repair(self, recovery: Recovery) -> LevelOutcome:
        """Train; the result is the best state on the held-out windows, which may be the start."""
        for text, what in ((recovery.train, "training"), (recovery.held_out, "held-out")):
            if text.counted is not None and not text.counted[:, 1:].any():
                raise DataError(
                    f"no token of the {what} windows counts: they contain no answer", "use --loss-on all, or other text"
                )
        try:
            if recovery.config.train == "lora":
                return _train_adapters(recovery)
            return _Training(recovery, trained_parameters(recovery)).run()
        finally:
            recovery.model.requires_grad_(False)


def trained_parameters(recovery: Recovery) -> dict[str, nn.Parameter]:
    """Let the parameters that ``config.train`` names require gradients, and return them by name.

    ``all`` is everything in the decoder blocks, and the vectors outside of them but for the head's bias: these are the
    final norm. Embeddings and the head are matrices and stay. Of rounded matrices the scales are parameters.

    Raises:
        ModelError: the factors are to be trained, and all layers are dense.
    """
    model = recovery.model
    if recovery.config.train == "factors":
        wanted = _factor_names(model, recovery.specs)
        if not wanted:
            raise ModelError("--train factors needs low-rank layers, and all layers are dense", "use --train all")
        return trained((name, model.get_parameter(name)) for name in wanted)
    inside = f"{find_blocks(model)[0]}."
    head = model.get_output_embeddings()
    frozen = set() if head is None else set(head.parameters())
    return trained(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(inside) or (parameter.ndim == 1 and parameter not in frozen)
    )


def _factor_names(model: nn.Module, specs: Sequence[LinearSpec]) -> list[str]:
    found = [spec.weight.name for spec in specs if isinstance(spec.weight.owner(model), CompressedLinear)]
    return [f"{name}.{part}.weight" for name in found for part in "AB"]


def _train_adapters(recovery: Recovery) -> LevelOutcome:
    """Train LoRA adapters; merge them into the weights, or write them into a folder of the result."""
    config, model = recovery.config, recovery.model
    with in_stored_layout(model, recovery.specs[0].layout) if config.keep_adapter else nullcontext():
        adapters = Adapters(model, recovery.specs, config.lora_rank, config.seed)
        try:
            outcome = _Training(recovery, adapters.parameters()).run()
            if config.keep_adapter:
                outcome = replace(outcome, adapter=recovery.unseen_distance().kl)
                recovery.saved.write_folder(ADAPTER_FOLDER, adapters.save)
        except BaseException:
            adapters.remove()
            raise
        if not config.keep_adapter:
            adapters.merge()
            return outcome
        adapters.remove()
    note = (
        f"the weights are unchanged; the LoRA adapter of rank {config.lora_rank} is in {ADAPTER_FOLDER}/, and with it "
        f"the held-out divergence is {outcome.adapter:.4f}"
    )
    return replace(outcome, notes=(*outcome.notes, note))


class _Training:
    """One training, and what its steps share."""

    def __init__(self, recovery: Recovery, parameters: dict[str, nn.Parameter]) -> None:
        self.recovery, self.config, self.parameters = recovery, recovery.config, parameters
        self.group = recovery.group
        # The two matrices of an adapter are small, one of them starts at zero.
        method: Method = "adamw" if self.config.train == "lora" else self.config.optimiser
        self.optimiser = recovery.optimiser(parameters, self.config.steps, self.config.rate or _RATE, method)
        self.history = History()
        self.best: dict[str, torch.Tensor] = {}
        self.judge = Teacher(recovery.dense, recovery.held_out.ids, keep=True)
        again = self.config.steps * self.config.batch > len(recovery.train.ids)
        self.teacher = Teacher(recovery.dense, recovery.train.ids, keep=again)
        self.recomputation = Recomputation(())
        self.head = Head(recovery.model)

    def run(self) -> LevelOutcome:
        """Train to the end, until checks no longer improve, or until Ctrl+C; the model gets the best parameters."""
        self._resume()
        self.clock = time.monotonic() - self.history.seconds
        self._choose_activations()
        ended, interrupted = None, None
        try:
            with self.recovery.report.bar("Distilling", self.config.steps) as bar:
                if not self.history.rows:
                    self._log(0, None, None, self._check())
                self.optimiser.rate = self._rate()
                bar.advance(self.history.step)
                while self.history.step < self.config.steps and (ended := self._ended()) is None:
                    self._step()
                    bar.advance()
        except KeyboardInterrupt:
            if not self.recovery.keep_on_interrupt or not self.history.rows:
                raise
            interrupted = f"interrupted after step {self.history.step} of {self.config.steps}"
        self.optimiser.clear()
        self._assign(self.best)
        self._write_history()
        return self._outcome(ended, interrupted)

    def _rate(self) -> float:
        """Return the highest learning rate; the limit per nat is known for the weights of blocks only."""
        config = self.config
        if config.rate is not None:
            return config.rate
        if config.train == "lora" or self.recovery.stored:
            return _RATE
        rate = min(_RATE, max(_RATE_PER_NAT * self.history.checks[0], bounds.MIN_RATE))
        self.recovery.report.fact(f"learning rate {rate:.2g} (--rate)")
        return rate

    def _step(self) -> None:
        """Take one step, log it, check it and save the state where they are due."""
        config, step = self.config, self.history.step
        windows = batch_indices(len(self.recovery.train.ids), config.batch, step, config.seed)
        total, counted = 0.0, 0
        own = windows[self.group.rank :: self.group.size]
        for rows in own.split(config.batch_size) if len(own) else ():
            with torch.enable_grad(), self.recomputation.active():
                losses, count = self._losses(self.recovery.train, self.teacher, rows)
                losses.sum().backward()
            self.optimiser.collect()
            total, counted = total + _sum(losses), counted + count
        total, counted = self._of_all(total, counted)
        # A batch of conversations may hold no answer that counts; then only the momentum moves the weights.
        loss = total / max(1, counted)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss of step {step + 1} is {loss}", "lower --rate, or try --dtype float32 or a higher --keep"
            )
        norm = self.optimiser.step(1 / max(1, counted))
        due = step + 1 == config.steps or (step + 1) % config.check_every == 0
        self._log(step + 1, loss, norm, self._check() if due else None)
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            self._save()

    def _losses(self, text: RecoveryText, teacher: Teacher, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the losses (b, t − 1) of some windows, 0 where a token does not count, and how many count."""
        device = self.recovery.device
        ids = text.ids[rows].to(device)
        losses = self.head.scores(ids).losses(divergence_from(teacher.scores(rows), ids))
        weights = text.weights(rows)
        if weights is None:
            return losses, losses.numel()
        return losses.masked_fill(~weights.to(device), 0.0), int(weights.sum())

    @torch.no_grad()
    def _held_out(self) -> float:
        """Return the mean loss of the tokens of the held-out windows that count."""
        text, group = self.recovery.held_out, self.group
        total, counted = 0.0, 0
        for rows in torch.arange(group.rank, len(text.ids), group.size).split(self.config.batch_size):
            losses, count = self._losses(text, self.judge, rows)
            total, counted = total + _sum(losses), counted + count
        total, counted = self._of_all(total, counted)
        return total / counted

    def _of_all(self, total: float, counted: int) -> tuple[float, int]:
        """Return the sum of losses and the number of counted tokens over all processes."""
        sums = torch.tensor([total, counted], dtype=torch.float64)
        self.group.total([sums])
        return float(sums[0]), int(sums[1])

    def _check(self) -> float:
        """Return the held-out loss; keep the parameters if it is the lowest."""
        value = self._held_out()
        if not math.isfinite(value):
            raise NumericalError(
                f"the held-out loss is {value}", "lower --rate, or try --dtype float32 or a higher --keep"
            )
        if all(value < other for other in self.history.checks.values()):
            self.best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        return value

    def _log(self, step: int, loss: float | None, norm: float | None, held_out: float | None) -> None:
        config = self.config
        rate = rate_at(step - 1, config.steps, self.optimiser.rate) if step else None
        tokens, seconds = step * config.batch * self.recovery.train.ids.shape[1], time.monotonic() - self.clock
        self.history.rows.append(Row(step, loss, held_out, rate, norm, tokens, seconds))
        if held_out is None:
            return
        said = f"step {step} of {config.steps}: " + ("" if loss is None else f"loss {loss:.4f}, ")
        best = self.history.checks[self.history.best_step]
        self.recovery.report.fact(f"{said}held-out KL {held_out:.4f} nats/token (best {best:.4f})")
        self.history.check_divergence()

    def _ended(self) -> str | None:
        """Return why the training ends before its last step, or ``None``."""
        since = self.history.checks_since_best()
        if since < self.config.patience:
            return None
        return f"stopped after step {self.history.step} of {self.config.steps}: {since} checks without improvement"

    def _choose_activations(self) -> None:
        """Decide whether backward passes recompute the activations inside blocks; the result is the same."""
        model, config = self.recovery.model, self.config
        ids = self.recovery.train.ids[:1].to(self.recovery.device)
        windows = min(config.batch_size, config.batch)
        trained_bytes = _OPTIMISER_BYTES * sum(parameter.numel() for parameter in self.parameters.values())
        self.recomputation = choose_recomputation(model, ids, windows, self.recovery.report, extra=trained_bytes)

    def _save(self) -> None:
        best = {f"{_BEST}{name}": value for name, value in self.best.items()}
        self.recovery.saved.save_state({**self.optimiser.state(), **best}, {"rows": self.history.plain()})
        self._write_history()

    def _write_history(self) -> None:
        if self.group.writes:
            self.history.write(self.recovery.saved, self.config.tensorboard)

    def _resume(self) -> None:
        """Continue from the saved state, if there is one."""
        found = self.recovery.saved.state()
        if found is None:
            return
        tensors, values = found
        try:
            history = History.from_plain(values.get("rows"))
            best = {name: tensors.get(f"{_BEST}{name}") for name in self.parameters}
            for name, parameter in self.parameters.items():
                stored = best[name]
                if stored is None or stored.shape != parameter.shape or stored.dtype != parameter.dtype:
                    raise ValueError(f"no best value of {name}")
            self.optimiser.restore(tensors, history.step)
        except ValueError:
            self.recovery.report.warn("the saved state of the training is not valid: the training starts again")
            return
        self.history, self.best = history, {name: value for name, value in best.items() if value is not None}
        self.recovery.report.fact(f"resuming after step {history.step} of {self.config.steps}")

    @torch.no_grad()
    def _assign(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def _outcome(self, ended: str | None, interrupted: str | None) -> LevelOutcome:
        history = self.history
        checks, best = history.checks, history.best_step
        notes = [
            f"held-out KL to the dense model {checks[0]:.4f} → {checks[best]:.4f} nats/token, "
            f"best after step {best} of {self.config.steps}"
        ]
        if ended is not None:
            notes.append(ended)
        if best == 0 and interrupted is None:
            notes.append("no check was better than the start, so nothing has changed: try a lower --rate")
        details = {
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "held_out_kl": {"before": checks[0], "after": checks[best]},
            "best_step": best,
            "steps": history.step,
            "curve": [{"step": row.step, "loss": row.loss, "held_out": row.held_out} for row in history.rows],
        }
        return LevelOutcome(history.tokens, tuple(notes), interrupted, details)


def _sum(losses: torch.Tensor) -> float:
    return float(losses.detach().cpu().sum(dtype=torch.float64))
