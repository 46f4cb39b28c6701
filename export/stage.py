"""``ara export``: the chosen checkpoint, or any folder, as ONNX; written aside, proven, then put in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ara.errors import UsageError, disk_errors
from ara.manifest import file_sha256
from ara.stage_view import StageView, parent_of
from ara.stages.common import Run, already_done, begin
from ara.stages.truncate import CHECKPOINT
from export.config import ExportConfig


def export(config: ExportConfig, run: Run, *, checkpoint: str | None = None, name: str | None = None) -> StageView:
    """Write the chosen checkpoint of the workspace for another runtime.

    Args:
        config: precision, provider, form of the graph.
        run: workspace and reporter.
        checkpoint: which result of ``ara truncate``; the latest by default.
        name: of the result; checkpoint and precision by default.

    Raises:
        AraError: no checkpoint, a family or precision that cannot be exported, a graph that is not the checkpoint.
    """
    from export.onnx_target import resolve, write_onnx

    started = begin()
    resolved = resolve(config)
    workspace = run.open()
    with workspace.lock(run.command):
        truncated = workspace.require("truncate", checkpoint)
        assert truncated.manifest is not None
        run.report.step(f"Exporting {truncated.key} to ONNX")
        facts = {
            "config": {**resolved.model_dump(mode="json"), "rewrite_sha256": _digest(config)},
            "model": truncated.manifest.model,
            "parents": (parent_of(truncated),),
        }
        name = name or f"{truncated.name}-{'rewritten' if resolved.rewrite else resolved.precision}"
        done = workspace.finished("export", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        with workspace.writer("export", name, facts, command=run.command, started=started) as stage:
            source = truncated.path / CHECKPOINT
            about = write_onnx(source, stage.folder, resolved, truncated.manifest.id, run.report)
            stage.results.update(about)
        return workspace.view(f"export/{name}")


def _digest(config: ExportConfig) -> str | None:
    """Return the checksum of the graph to be rewritten; its weights lie in another file and are checked one by one."""
    if config.rewrite is None:
        return None
    path = Path(config.rewrite)
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "--rewrite wants the .onnx file of a dense export")
    return file_sha256(path)


def export_folder(
    config: ExportConfig, run: Run, source: Path, output: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the checkpoint in ``source`` to ``output``, without a workspace; returns ``ara_export.json``.

    Args:
        config: precision, provider, form of the graph.
        run: reporter.
        source: folder of a checkpoint, compressed or dense.
        output: folder to write; stays as it is until the new one is whole and proven.
        overwrite: replace what is in ``output``.

    Raises:
        AraError: as :func:`export`; ``output`` is not empty.
    """
    from export.onnx_target import resolve, source_hash, write_onnx

    resolved = resolve(config)
    _digest(config)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise UsageError(f"{output} is not empty", "choose another folder, or replace it with --overwrite")
    run.report.step(f"Exporting {source} to ONNX")
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors(output):
            aside.mkdir(parents=True)
        about = write_onnx(source, aside, resolved, source_hash(source), run.report)
        if output.is_dir():
            shutil.rmtree(output)
        elif output.exists():
            output.unlink()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return about
