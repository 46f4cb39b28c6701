"""``ara recover``: repair the values of a compressed checkpoint, level by level; its ranks stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ara.artifacts.checkpoint import (
    CHECKPOINT,
    CheckpointResults,
    CheckpointSettings,
    RecoveredLevel,
    RecoveryFigures,
)
from ara.artifacts.factors import factor_files, specs_of
from ara.artifacts.ranks import layout_of
from ara.config import RecoverConfig
from ara.environment import keep_freed_memory, peak_memory_bytes
from ara.errors import UsageError
from ara.layout_names import LayoutName
from ara.models.checkpoint import checkpoint_bytes, load, save_checkpoint
from ara.models.low_rank import low_rank_layers
from ara.models.placement import Placement, choose_placement, torch_dtype
from ara.recovery import LEVELS, levels_to_run
from ara.recovery.base import Distance, Level, Recovery
from ara.recovery.trainable import from_trainable, load_tensors, to_trainable
from ara.stages.common import Run, already_done, begin, model_of, open_task
from ara.stages.recovery_parts import LevelParts
from ara.stages.recovery_text import RecoveryTexts, recovery_texts
from ara.stages.truncate import finish_checkpoint, provenance
from ara.workspace.manifest import Manifest
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.models.sources import ModelSource

# Choices of every layer and curves of every level, for other programs.
DETAILS = "recovery.json"


def recover(
    config: RecoverConfig,
    run: Run,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    keep_on_interrupt: bool = False,
) -> StageView:
    """Repair a checkpoint, and store the result as a further checkpoint.

    Args:
        config: level, text, settings of the levels.
        run: workspace and reporter.
        checkpoint: NAME or STAGE/NAME of the checkpoint; by default the latest that is not repaired.
        name: of the result; the checkpoint's name and the level by default.
        keep_on_interrupt: on Ctrl+C store what is finished as the result; the same call resumes later. Otherwise
            Ctrl+C raises ``KeyboardInterrupt``, and the next call resumes as well.

    Raises:
        AraError: no checkpoint, a densified one, too little text, NaN or divergence, a missing package.
    """
    started = begin(name, checkpoint)
    levels = check_levels(config)
    with open_task("recover", run, started) as task:
        before = task.workspace.require("checkpoint", checkpoint, not_by=("recover", "quantise"))
        figures = CheckpointResults.read(before)
        if figures.densified:
            raise UsageError(
                f"{before.key} is densified: it has no low-rank layers whose rank could stay",
                "recover the checkpoint that ara truncate writes without --densify",
            )
        if figures.rounding is not None:
            raise UsageError(
                f"{before.key} is rounded to {' and '.join(figures.rounding.bits)} bits",
                "recover the checkpoint that it was made from, then quantise that",
            )
        chosen = task.workspace.ancestor(before, "ranks")
        decomposition = task.workspace.ancestor(chosen, "factors")
        assert decomposition.manifest is not None and chosen.manifest is not None
        run.report.step(f"Recovering {before.key}: {', '.join(levels)}")
        placement = _placement(config)
        run.report.fact(placement.why)
        source = model_of(decomposition, run)
        texts = recovery_texts(config, levels, decomposition, source, task.workspace, run)
        resolved = config.model_copy(
            update={
                "device": placement.device,
                "dtype": CheckpointSettings.read(before).dtype,
                "text": texts.spec,
                "seq_len": texts.seq_len,
            }
        )
        # Settings of levels that do not run make no other result.
        idle = {name for entry in LEVELS if entry.name not in levels for name in entry.load().settings}
        settings = {
            **resolved.model_dump(mode="json", exclude=idle),
            "compute_dtype": placement.dtype,
            "text_sha256": texts.digest,
        }
        task.describe(name or _default_name(before, config), settings, (before, decomposition))
        done = task.finished()
        if done is not None and not run.force and not task.unfinished():
            return already_done(done, run)
        layout = layout_of(chosen)
        specs = specs_of(decomposition, layout)
        made = CheckpointInputs(decomposition.manifest, chosen.manifest, source, resolved.dtype)
        with task.writer(seed=config.seed, resumable=True) as stage:
            run.report.fact("loading both models")
            if placement.device == "cpu":
                keep_freed_memory()
            dense = source.load_model(torch_dtype(placement.dtype), placement.device).eval().requires_grad_(False)
            model = load(before.path / CHECKPOINT, placement.device, placement.dtype)
            to_trainable(model, layout)
            recovery = Recovery(
                dense,
                model,
                specs,
                factor_files(decomposition, specs),
                next(iter(texts.train.values())),
                texts.held_out,
                texts.unseen,
                resolved.model_copy(update={"dtype": placement.dtype}),
                LevelParts(stage, ""),
                run.report,
                keep_on_interrupt,
            )
            found, details = _Levels(recovery, stage, texts).all(levels)
            _write(recovery, layout, stage, replace(figures, recovery=found), made)
            text = json.dumps(details, indent=1, allow_nan=False)
            (stage.folder / DETAILS).write_text(text + "\n", encoding="utf-8")
        return task.view()


def check_levels(config: RecoverConfig) -> dict[str, Level]:
    """Return the levels to run, by name and in order.

    Raises:
        AraError: there is no such level, a package is missing, or settings contradict each other.
    """
    levels: dict[str, Level] = {name: LEVELS.load(name)() for name in levels_to_run(config.level, config.only)}
    for level in levels.values():
        level.check(config)
    return levels


def _placement(config: RecoverConfig) -> Placement:
    placement = choose_placement(config.device, config.dtype)
    if placement.dtype == "float16":
        # Gradients of float16 weights underflow; the GPUs that would get it by default have no bfloat16.
        return choose_placement(config.device, "float32")
    return placement


def _default_name(before: StageView, config: RecoverConfig) -> str:
    alone = config.only and config.level != LEVELS.names()[0]
    return f"{before.name}-{config.level}{'-only' if alone else ''}"


@dataclass(frozen=True)
class CheckpointInputs:
    """What a repaired checkpoint names as its origin: manifests of factors and ranks, the model, the stored dtype."""

    decomposition: Manifest
    ranks: Manifest
    source: ModelSource
    dtype: str


class _Levels:
    """Runs levels one after the other; takes one back that raises the divergence from the dense model."""

    def __init__(self, recovery: Recovery, stage: StageWriter, texts: RecoveryTexts) -> None:
        self.recovery, self.stage, self.texts, self.report = recovery, stage, texts, recovery.report

    def all(self, levels: Mapping[str, Level]) -> tuple[RecoveryFigures, dict[str, Any]]:
        """Run the levels and return their figures and details; finished ones are read from the stage."""
        recovery = self.recovery
        first = self._start()
        rows: list[RecoveredLevel] = []
        details: dict[str, Any] = {}
        now, stopped = first, None
        for name, level in levels.items():
            work = self.stage.work(f"level-{name}")
            if work is None:
                row, now, stopped, details[name] = self._run(name, level, now)
            else:
                load_tensors(recovery.model, load_file(work[0]))
                row, now = RecoveredLevel.parse(work[1]["row"]), Distance(**work[1]["distance"])
                details[name] = work[1]["details"]
            rows.append(row)
            self.report.fact(_told(row))
            if stopped:
                self.stage.to_go_on = True
                self.report.warn(f"{name}: {stopped}: what is finished is stored; the same command resumes")
                break
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

    def _start(self) -> Distance:
        """Return the distance from the dense model before any repair."""
        work = self.stage.work("start")
        if work is not None:
            return Distance(**work[1])
        with self.report.bar("Reading held-out text", len(self.recovery.unseen.ids)) as bar:
            found = self.recovery.unseen_distance(bar.advance)
        self.report.fact(f"divergence from the dense model on held-out text: {found.kl:.4f} nats/token")
        self.stage.finish_work("start", {"none": torch.zeros(1)}, asdict(found))
        return found

    def _run(
        self, name: str, level: Level, before: Distance
    ) -> tuple[RecoveredLevel, Distance, str | None, dict[str, Any]]:
        """Run one level, keep it unless the divergence has grown, and store the state after it."""
        parts = LevelParts(self.stage, name)
        recovery = replace(self.recovery, train=self.texts.train[name], saved=parts)
        self.report.step(f"Level {name}: {LEVELS.entry(name).title}")
        kept = _state(recovery.model)
        outcome = level.repair(recovery)
        recovery.model.requires_grad_(False)
        after = recovery.unseen_distance()
        row = RecoveredLevel(
            level=name,
            tokens=outcome.tokens,
            seconds=parts.elapsed(),
            peak_memory_bytes=peak_memory_bytes(),
            before=before.kl,
            after=after.kl,
            kept=after.kl <= before.kl,
            notes=outcome.notes,
        )
        if not row.kept:
            load_tensors(recovery.model, kept)
            self.report.warn(
                f"level {name} is taken back: it raises the divergence on held-out text from {before.kl:.4f} to "
                f"{after.kl:.4f} nats/token"
            )
        now, details = after if row.kept else before, dict(outcome.details)
        if outcome.interrupted is None:
            values = {"row": row.plain(), "distance": asdict(now), "details": details}
            self.stage.finish_work(f"level-{name}", _state(recovery.model), values)
            self.stage.drop_work(f"{name}:")
        return row, now, outcome.interrupted, details


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return copies of all parameters on the CPU, by path."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}


def _told(row: RecoveredLevel) -> str:
    words = f"{row.level}: held-out divergence {row.before:.4f} → {row.after:.4f} nats/token"
    return "; ".join([words, *row.notes])


def _write(
    recovery: Recovery,
    layout: LayoutName,
    stage: StageWriter,
    results: CheckpointResults,
    made: CheckpointInputs,
) -> None:
    """Store the repaired model as a checkpoint in the layout and precision of the one that it was made from."""
    model = recovery.model
    ranks = low_rank_layers(model)
    recovery.report.fact("writing the checkpoint")
    from_trainable(model, layout, torch_dtype(made.dtype), recovery.report)
    model.to(torch_dtype(made.dtype))
    folder = stage.folder / CHECKPOINT
    assert results.recovery is not None
    how = [{"level": row.level, "tokens": row.tokens} for row in results.recovery.levels if row.kept]
    save_checkpoint(
        model,
        made.source.load_tokenizer(),
        folder,
        ranks=ranks,
        layout=layout,
        provenance={**provenance(made.decomposition, made.ranks), "recovery": how},
    )
    results = replace(results, disk_bytes=checkpoint_bytes(folder))
    finish_checkpoint(stage, results, made.decomposition, made.ranks, made.dtype, recovery.report)
