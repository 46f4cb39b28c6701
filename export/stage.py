"""``ara export``: the chosen checkpoint, or any folder, as ONNX; written aside, proven, then put in place."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from ara.errors import OutputError, UsageError, disk_errors
from ara.manifest import file_sha256
from ara.stage_view import StageView, parent_of
from ara.stages.common import Run, already_done, begin
from ara.stages.truncate import CHECKPOINT
from export.config import ExportConfig
from export.report import REPORT_FILE, ExportReport
from export.weights import Checkpoint


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

    started = begin(checkpoint, name)
    resolved, dense = resolve(config), _dense_graph(config)
    workspace = run.open()
    with workspace.lock(run.command):
        truncated = workspace.require("truncate", checkpoint)
        assert truncated.manifest is not None
        run.report.step(f"Exporting {truncated.key} to ONNX")
        facts = {
            # The graph's weights lie in another file, and are checked one by one.
            "config": {**resolved.model_dump(mode="json"), "rewrite_sha256": file_sha256(dense) if dense else None},
            "model": truncated.manifest.model,
            "parents": (parent_of(truncated),),
        }
        name = name or f"{truncated.name}-{'rewritten' if resolved.rewrite else resolved.precision}"
        done = workspace.finished("export", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        with workspace.writer("export", name, facts, command=run.command, started=started) as stage:
            source = Checkpoint(truncated.path / CHECKPOINT)
            about = write_onnx(source, stage.folder, resolved, truncated.manifest.id, run.report)
            stage.results.update(about.model_dump(mode="json"))
        return workspace.view(f"export/{name}")


def _dense_graph(config: ExportConfig) -> Path | None:
    """Return the graph to be rewritten, if there is to be one."""
    if config.rewrite is None:
        return None
    path = Path(config.rewrite).resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "--rewrite wants the .onnx file of a dense export")
    return path


def export_folder(
    config: ExportConfig, run: Run, source: Path, output: Path, *, overwrite: bool = False
) -> ExportReport:
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

    resolved, dense = resolve(config), _dense_graph(config)
    source, output = source.resolve(), output.resolve()
    _refuse_output(output, [source, *([dense] if dense else [])], overwrite)
    run.report.step(f"Exporting {source} to ONNX")
    checkpoint = Checkpoint(source)
    aside, before = (output.with_name(f".{output.name}.{word}") for word in ("partial", "before"))
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        with disk_errors(output):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        about = write_onnx(checkpoint, aside, resolved, source_hash(source), run.report)
        if output.exists():
            output.rename(before)
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if before.exists() and not output.exists():
            before.rename(output)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(before, ignore_errors=True)
    return about


def _refuse_output(output: Path, needed: list[Path], overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier export, or that something else lives in.

    Raises:
        OutputError: such a folder.
    """
    for path in (*needed, Path.cwd()):
        if path.is_relative_to(output) or (path != Path.cwd() and output.is_relative_to(path)):
            raise OutputError(f"--output {output} and {path} lie in one another", "choose another folder")
    if not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        if not overwrite:
            raise OutputError(f"{output} is not empty", "choose another folder, or replace an export with --overwrite")
        if not (output / REPORT_FILE).is_file():
            raise OutputError(
                f"{output} is not an export (no {REPORT_FILE}), so --overwrite does not touch it",
                "choose another folder",
            )
