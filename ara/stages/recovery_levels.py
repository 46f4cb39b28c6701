"""Runs the levels of a recovery one after the other, and judges each on text that no level reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ara.artifacts.checkpoint import RecoveredLevel, RecoveryFigures
from ara.config import RecoverConfig
from ara.distributed.group import ALONE, Group
from ara.environment import peak_memory_bytes
from ara.errors import AraError, MemoryShortError, NumericalError, first_line, is_out_of_memory
from ara.models.experts import run_one_by_one
from ara.models.kept import Keep
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec
from ara.progress import Reporter
from ara.recovery import LEVELS
from ara.recovery.base import Distance, Level, Recovery
from ara.recovery.rounded import stored_parameters, to_scaled
from ara.recovery.trainable import load_tensors, to_trainable
from ara.stages.recovery_parts import LevelParts, SharedWork
from ara.stages.recovery_text import RecoveryTexts
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.layouts.modeling_ara import RoundedMatrix


def open_recovery(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    rounded: Mapping[str, RoundedMatrix],
    specs: Sequence[LinearSpec],
    factors: Mapping[str, Path],
    texts: RecoveryTexts,
    config: RecoverConfig,
    dtype: str,
    stage: StageWriter | None,
    report: Reporter,
    keep: Keep | None = None,
    group: Group = ALONE,
) -> Recovery:
    """Bring a compressed model into its trainable form, in place, and return what the levels work on.

    Args:
        dense: the dense model.
        model: the compressed one, with ordinary matrices in place of the rounded ones.
        rounded: path → module of few bits; none if the model is not rounded.
        specs: the factorised layers, in the layout of the model.
        factors: module path → file with its factors.
        texts: windows of the levels.
        config: with resolved device and dtype.
        dtype: name of the dtype in which the repaired model will be stored.
        stage: keeps finished parts; ``None`` in processes that do not write.
        report: progress.
        keep: of the weights of a model that is not rounded, see :func:`to_trainable`.
        group: processes that share the work.
    """
    layout = specs[0].layout
    if rounded:
        to_scaled(model, rounded, layout)
    else:
        to_trainable(model, layout, keep)
    if keep is not None:
        run_one_by_one(model)
    return Recovery(
        dense.eval().requires_grad_(False),
        model,
        specs,
        factors,
        next(iter(texts.train.values())),
        texts.held_out,
        texts.unseen,
        config.model_copy(update={"text": texts.spec, "seq_len": texts.seq_len}),
        LevelParts(SharedWork(stage, group), ""),
        report,
        stored=stored_parameters(model, torch_dtype(dtype), rounded) if rounded else {},
        group=group,
    )


class LevelRuns:
    """Runs levels one after the other; takes one back that raises the divergence from the dense model."""

    def __init__(self, recovery: Recovery, stage: StageWriter | None, texts: RecoveryTexts, scope: str = "") -> None:
        """Prepare the first level.

        Args:
            recovery: both models.
            stage: keeps finished parts; ``None`` in processes that do not write.
            texts: windows of every level.
            scope: see :class:`LevelParts`.
        """
        self.recovery, self.stage, self.texts, self.report = recovery, stage, texts, recovery.report
        self._work, self._scope = SharedWork(stage, recovery.group), scope
        # Part of the work with the parameters before the next level.
        self._before = "start"
        # The level that has ended the repair, and why, while the finished ones are stored as the result.
        self.failure: tuple[str, AraError] | None = None

    def all(self, levels: Mapping[str, Level]) -> tuple[RecoveryFigures, dict[str, Any]]:
        """Run the levels and return their figures and details; finished ones are read from the stage."""
        recovery = self.recovery
        first = self._start()
        rows: list[RecoveredLevel] = []
        details: dict[str, Any] = {}
        now, stopped = first, None
        for name, level in levels.items():
            work = self._work.find(f"{self._scope}level-{name}")
            if work is None:
                try:
                    row, now, stopped, details[name] = self._run(name, level, now)
                except (NumericalError, MemoryShortError, KeyboardInterrupt) as error:
                    stopped = self._given_up(name, error, bool(rows))
                    break
            else:
                self._load(f"level-{name}")
                row, now = RecoveredLevel.parse(work[1]["row"]), Distance(**work[1]["distance"])
                details[name] = work[1]["details"]
            self._before = f"level-{name}"
            rows.append(row)
            self.report.fact(_told(row))
            if stopped:
                break
        if stopped:
            # Only where one process does all the work.
            assert self.stage is not None
            self.stage.to_go_on = True
            # A failure is an error, which the caller raises.
            if self.failure is None:
                self.report.warn(f"{name}: {stopped}: what is finished is stored; the same command resumes")
        figures = RecoveryFigures(
            parts=self.texts.parts,
            windows=self.texts.windows,
            held_out=len(recovery.unseen.ids),
            seq_len=self.texts.seq_len,
            before=first.kl,
            after=now.kl,
            dense_loss=first.dense_loss,
            loss_before=first.loss,
            loss_after=now.loss,
            levels=tuple(rows),
            stopped=stopped,
        )
        return figures, details

    def _given_up(self, name: str, error: AraError | KeyboardInterrupt, some: bool) -> str:
        """Return why the repair ends before level ``name``; the model gets the parameters of the levels before it.

        Args:
            name: the level that has ended with ``error``.
            error: kept in :attr:`failure`, unless it is Ctrl+C.
            some: whether a level before it has finished.

        Raises:
            AraError, KeyboardInterrupt: ``error``, if there is nothing to keep.
        """
        interrupted = isinstance(error, KeyboardInterrupt)
        alone = self.stage is not None and self.recovery.group.size == 1 and not self._scope
        if not (some and alone) or (interrupted and not self.recovery.keep_on_interrupt):
            raise error
        self.recovery.model.requires_grad_(False)
        self._load(self._before)
        if isinstance(error, AraError):
            self.failure = name, error
            return f"{name} failed: {error}"
        return f"interrupted at the beginning of {name}"

    def _start(self) -> Distance:
        """Return the distance from the dense model before any repair; store it with the parameters."""
        work = self._work.find(f"{self._scope}start")
        if work is not None:
            return Distance(**work[1])
        windows = len(self.recovery.unseen.share(self.recovery.group).ids)
        with self.report.bar("Reading held-out text", windows) as bar:
            found = self.recovery.unseen_distance(bar.advance)
        self.report.fact(f"divergence from the dense model on held-out text: {found.kl:.4f} nats/token")
        self._work.finish(f"{self._scope}start", _parameters(self.recovery.model), asdict(found))
        return found

    def _run(
        self, name: str, level: Level, before: Distance
    ) -> tuple[RecoveredLevel, Distance, str | None, dict[str, Any]]:
        """Run one level, keep it unless the divergence has grown, and store the state after it."""
        parts = LevelParts(self._work, name, self._scope)
        recovery = replace(self.recovery, train=self.texts.train[name], saved=parts)
        self.report.step(f"Level {name}: {LEVELS.entry(name).title}")
        try:
            outcome = level.repair(recovery)
            recovery.model.requires_grad_(False)
            after = recovery.unseen_distance()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            elsewhere = "" if recovery.device.type == "cpu" else ", or --device cpu"
            raise MemoryShortError(
                f"the level {name} ran out of memory: {first_line(error)}", f"use {level.less_memory}{elsewhere}"
            ) from error
        row = RecoveredLevel(
            level=name,
            tokens=outcome.tokens,
            seconds=parts.elapsed(),
            peak_memory_bytes=peak_memory_bytes(),
            before=before.kl,
            after=after.kl,
            kept=after.kl <= before.kl,
            notes=outcome.notes,
            adapter=outcome.adapter,
        )
        if not row.kept:
            self._load(self._before)
            self.report.warn(
                f"level {name} is taken back: it raises the divergence on held-out text from {before.kl:.4f} to "
                f"{after.kl:.4f} nats/token"
            )
        if row.adapter is not None and row.adapter > before.kl:
            self.report.warn(
                f"the adapter of level {name} raises the divergence on held-out text from {before.kl:.4f} to "
                f"{row.adapter:.4f} nats/token: do not use it"
            )
        now, details = after if row.kept else before, dict(outcome.details)
        if outcome.interrupted is None:
            values = {"row": row.plain(), "distance": asdict(now), "details": details}
            self._work.finish(f"{self._scope}level-{name}", _parameters(recovery.model), values)
            self._work.drop(f"{self._scope}{name}:")
        return row, now, outcome.interrupted, details

    def _load(self, part: str) -> None:
        """Give the model the parameters of a finished part of the work."""
        work = self._work.find(f"{self._scope}{part}")
        assert work is not None, part
        load_tensors(self.recovery.model, load_file(work[0]))


def _parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return all parameters on the CPU by path; not copied if they are there."""
    return {name: value.detach().cpu() for name, value in model.named_parameters()}


def _told(row: RecoveredLevel) -> str:
    words = f"{row.level}: held-out divergence {row.before:.4f} → {row.after:.4f} nats/token"
    return "; ".join([words, *row.notes])
