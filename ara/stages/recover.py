"""``ara recover``: repair the values of a compressed checkpoint, level by level; its ranks stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ara.artifacts.checkpoint import CHECKPOINT
from ara.artifacts.factors import factor_files
from ara.config import RecoverConfig
from ara.environment import keep_freed_memory
from ara.models.checkpoint import load
from ara.models.placement import Placement, choose_placement, torch_dtype
from ara.recovery import LEVELS, levels_to_run
from ara.recovery.base import Level, Recovery
from ara.recovery.trainable import from_trainable, to_trainable
from ara.stages.common import Run, already_done, begin, model_of, open_task
from ara.stages.compressed import Compressed, require_compressed
from ara.stages.recovery_levels import LevelRuns
from ara.stages.recovery_parts import LevelParts
from ara.stages.recovery_text import RecoveryTexts, recovery_texts
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
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
        before = require_compressed(task.workspace, checkpoint, ("recover", "quantise"), "recover")
        run.report.step(f"Recovering {before.view.key}: {', '.join(levels)}")
        placement = _placement(config)
        run.report.fact(placement.why)
        source = model_of(before.factors, run)
        texts = recovery_texts(config, levels, before.factors, source, task.workspace, run)
        settings = _settings(config, levels, before, placement, texts)
        task.describe(name or _default_name(before.view, config), settings, (before.view, before.factors))
        done = task.finished()
        if done is not None and not run.force and not task.unfinished():
            return already_done(done, run)
        with task.writer(seed=config.seed, resumable=True) as stage:
            used = config.model_copy(update={"device": placement.device, "dtype": placement.dtype})
            recovery = _open(used, before, source, texts, stage, run, keep_on_interrupt)
            found, details = LevelRuns(recovery, stage, texts).all(levels)
            from_trainable(recovery.model, before.layout, torch_dtype(before.dtype), run.report)
            how = [{"level": row.level, "tokens": row.tokens} for row in found.levels if row.kept]
            before.write(recovery.model, stage, run, {"recovery": how}, recovery=found)
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


def _settings(
    config: RecoverConfig,
    levels: Mapping[str, Level],
    before: Compressed,
    placement: Placement,
    texts: RecoveryTexts,
) -> dict[str, Any]:
    """Return what the result depends on. Settings of levels that do not run make no other result."""
    idle = {name for entry in LEVELS if entry.name not in levels for name in entry.load().settings}
    return config.model_dump(mode="json", exclude=idle) | {
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
    stage: StageWriter,
    run: Run,
    keep_on_interrupt: bool,
) -> Recovery:
    """Load both models, in the device and dtype of ``config``."""
    run.report.fact("loading both models")
    if config.device == "cpu":
        keep_freed_memory()
    dense = source.load_model(torch_dtype(config.dtype), config.device).eval().requires_grad_(False)
    model = load(before.view.path / CHECKPOINT, config.device, config.dtype)
    to_trainable(model, before.layout)
    return Recovery(
        dense,
        model,
        before.specs,
        factor_files(before.factors, before.specs),
        next(iter(texts.train.values())),
        texts.held_out,
        texts.unseen,
        config.model_copy(update={"text": texts.spec, "seq_len": texts.seq_len}),
        LevelParts(stage, ""),
        run.report,
        keep_on_interrupt,
    )
