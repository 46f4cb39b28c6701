"""``ara recover``: repair the values of a compressed checkpoint, level by level; its ranks and whole numbers stay."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ara.artifacts.checkpoint import CHECKPOINT, RecoveryFigures, RoundingFigures
from ara.artifacts.factors import factor_files
from ara.config import RecoverConfig
from ara.config.base import PlacementConfig
from ara.environment import keep_freed_memory
from ara.errors import AraError, WorkspaceError
from ara.models.checkpoint import load_rounded
from ara.models.kept import Keep
from ara.models.placement import Placement, choose_placement, torch_dtype
from ara.progress import Reporter
from ara.recovery import LEVELS, levels_to_run
from ara.recovery.base import Level, Recovery
from ara.recovery.rounded import from_scaled
from ara.recovery.trainable import from_trainable
from ara.solver.stored_ranks import StoredRanks
from ara.stages.common import Run, already_done, begin, model_of, open_task, outputs_folder
from ara.stages.compressed import Compressed, require_compressed
from ara.stages.recovery_levels import LevelRuns, open_recovery
from ara.stages.recovery_place import place_changed_weights
from ara.stages.recovery_text import RecoveryTexts, recovery_texts
from ara.stages.stored_ranks import stored_ranks
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.layouts.modeling_ara import RoundedMatrix
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
        keep_on_interrupt: on Ctrl+C store what is finished as the result; the same call resumes later. Otherwise, and
            in several processes, Ctrl+C raises ``KeyboardInterrupt``, and the next call resumes as well.

    Raises:
        AraError: no checkpoint, a densified one, a rounded one that the level cannot repair, too little text, NaN or
            divergence, a missing package.
    """
    started = begin(name, checkpoint)
    levels = check_levels(config)
    with open_task("recover", run, started) as task:
        before = require_compressed(task.workspace, checkpoint, ("recover",), "recover")
        if before.rounding is not None:
            levels = _levels_after_rounding(levels, before.view, before.rounding, config, run)
        levels = levels_with_ranks(levels, stored_ranks(before.factors), config, run.report)
        run.report.step(f"Recovering {before.view.key}: {', '.join(levels)}")
        placement, group = training_placement(config), run.group
        run.check_offload(placement.device)
        group.check_device(placement.device, placement.dtype)
        run.report.fact(placement.why)
        with group.first_of_machine():
            source = model_of(before.factors, run)
        made_from = before.view, before.factors
        texts: RecoveryTexts = group.broadcast(
            recovery_texts(config, levels, *made_from, source, task.workspace, run) if group.writes else None
        )
        texts.check_processes(group.size)
        settings = _settings(config, levels, before, placement, texts)
        task.describe(name or _default_name(before.view, config), settings, made_from)
        done = task.finished()
        if done is not None and not run.force and not task.unfinished():
            return already_done(done, run)
        used = config.model_copy(update={"device": placement.device, "dtype": placement.dtype})
        keep = group.broadcast(place_changed_weights(before, levels, used, task) if group.writes else None)
        writer = task.writer(seed=config.seed, resumable=True) if group.writes else nullcontext()
        with writer as stage:
            recovery, rounded = _open(used, before, source, texts, stage, run, keep)
            folder = outputs_folder(task.workspace)
            keep_on_interrupt = keep_on_interrupt and group.size == 1
            recovery = replace(recovery, keep_on_interrupt=keep_on_interrupt, folder=folder)
            runs = LevelRuns(recovery, stage, texts)
            found, details = runs.all(levels)
            # The others have read the finished parts, which the writer now removes.
            group.collect(None)
            if stage is not None:
                _write(before, recovery.model, rounded, found, stage, run, keep)
                text = json.dumps(details, indent=1, allow_nan=False)
                (stage.folder / DETAILS).write_text(text + "\n", encoding="utf-8")
        if runs.failure is not None:
            level, error = runs.failure
            raise _with_what_is_kept(level, error, found, task.view()) from error
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


def idle_settings(levels: Collection[str]) -> set[str]:
    """Return the settings of levels that do not run: they make no other result."""
    return {name for entry in LEVELS if entry.name not in levels for name in entry.load().settings}


def _levels_after_rounding(
    levels: Mapping[str, Level], view: StageView, rounding: RoundingFigures, config: RecoverConfig, run: Run
) -> dict[str, Level]:
    """Return the levels that can repair a rounded checkpoint, and report those that cannot.

    Raises:
        WorkspaceError: the wanted one cannot.
        UsageError: settings make no sense there.
    """
    found = {}
    for name, level in levels.items():
        if level.not_rounded is None:
            level.check_rounded(config)
            found[name] = level
        elif name == config.level:
            able = [f"--level {entry.name}" for entry in LEVELS if entry.load().not_rounded is None]
            raise WorkspaceError(
                f"{view.key} is rounded to {rounding.widths} bits, and the level {name} cannot repair it: "
                f"{level.not_rounded}",
                f"use {' or '.join(able)}; or recover the checkpoint that it was made from, and round afterwards",
            )
        else:
            run.report.fact(f"{name} is left out: {level.not_rounded}")
    return found


def levels_with_ranks(
    levels: Mapping[str, Level], stored: StoredRanks, config: RecoverConfig, report: Reporter, option: str = "--level"
) -> dict[str, Level]:
    """Return the levels that can work with the stored ranks, and report those that cannot.

    Args:
        levels: of the config, by name.
        stored: ranks of the decomposition.
        config: names the wanted level.
        report: hears of levels that are left out.
        option: that sets the level, for the error.

    Raises:
        UsageError: the wanted one cannot.
    """
    found = {}
    for name, level in levels.items():
        if not level.all_ranks or not stored.lacking:
            found[name] = level
        elif name == config.level:
            able = [f"{option} {entry.name}" for entry in LEVELS if not entry.load().all_ranks]
            stored.need_all(f"the level {name}", f"use {' or '.join(able)}")
        else:
            report.fact(f"{name} is left out: it needs the factors of all ranks")
    return found


def training_placement(config: PlacementConfig) -> Placement:
    """Return device and dtype of a stage that trains."""
    placement = choose_placement(config.device, config.dtype)
    if placement.dtype == "float16":
        # Gradients of float16 weights underflow; the GPUs that would get it by default have no bfloat16.
        return choose_placement(config.device, "float32")
    return placement


def _default_name(before: StageView, config: RecoverConfig) -> str:
    alone = config.only and config.level != LEVELS.names()[0]
    return f"{before.name}-{config.level}{'-only' if alone else ''}"


def _with_what_is_kept(level: str, error: AraError, found: RecoveryFigures, view: StageView) -> AraError:
    """Return the error of a level, and how to go on from the levels before it."""
    finished = ", ".join(row.level for row in found.levels)
    hint = "" if error.hint is None else f"{error.hint}; "
    return type(error)(
        f"{error}; {view.key} has what is finished: {finished}",
        f"{hint}to go on from there: --level {level} --only --from {view.key}",
    )


def _settings(
    config: RecoverConfig,
    levels: Mapping[str, Level],
    before: Compressed,
    placement: Placement,
    texts: RecoveryTexts,
) -> dict[str, Any]:
    """Return what the result depends on."""
    return config.model_dump(mode="json", exclude=idle_settings(levels)) | {
        "device": placement.device,
        "dtype": before.dtype,
        "text": texts.spec,
        "seq_len": texts.seq_len,
        "compute_dtype": placement.dtype,
        "text_sha256": texts.digest,
    }


def _open(
    config: RecoverConfig,
    before: Compressed,
    source: ModelSource,
    texts: RecoveryTexts,
    stage: StageWriter | None,
    run: Run,
    keep: Keep | None,
) -> tuple[Recovery, dict[str, RoundedMatrix]]:
    """Load both models, in the device and dtype of ``config``; also return the rounded matrices by path."""
    run.report.fact("loading both models")
    if config.device == "cpu" and keep is None:
        keep_freed_memory()
    with run.group.first_of_machine():
        dense = source.load_model(torch_dtype(config.dtype), config.device)
    model, rounded = load_rounded(before.view.path / CHECKPOINT, config.device, config.dtype, before.shared_experts)
    files = factor_files(before.factors, before.specs)
    recovery = open_recovery(
        dense,
        model,
        rounded,
        before.specs,
        files,
        texts,
        config,
        before.dtype,
        stage,
        run.report,
        keep,
        run.group,
    )
    return recovery, rounded


def _write(
    before: Compressed,
    model: PreTrainedModel,
    rounded: Mapping[str, RoundedMatrix],
    found: RecoveryFigures,
    stage: StageWriter,
    run: Run,
    keep: Keep | None,
) -> None:
    """Store the repaired model in the form of the checkpoint before."""
    how = [{"level": row.level, "tokens": row.tokens} for row in found.levels if row.in_weights]
    if before.rounding is None:
        from_trainable(model, before.layout, torch_dtype(before.dtype), run.report, keep)
        before.write(model, stage, run, {"recovery": how}, recovery=found)
    else:
        provenance = {"rounding": before.rounding.plain(), "recovery_after_rounding": how}
        numbers = from_scaled(model, rounded)
        before.write(model, stage, run, provenance, numbers, recovery_after_rounding=found)
